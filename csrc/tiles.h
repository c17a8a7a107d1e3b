// The vector kernels, written once over a handful of primitives (`V`) that each instruction set's file defines:
//
//   V::Code           what an input code becomes in scratch: uint8_t (s8 codes + 128) or int16_t
//   V::kUnit          codes per lane of one V::dot; a step is that many neighbouring codes
//   V::kFields        steps whose weights share one vector in memory; V::unpack(v, j) takes those of step j out, times
//                     2^V::kScaleBits, and V::put_weight puts them in
//   V::kLanes         int32 lanes of V::I32
//   V::kPixels        4 or 8; with V::kVectors (at most 3) the register block: accumulators = kPixels * kVectors
//   V::dot(a, x, w)   a[lane] += sum over unit of x[unit] * w[lane][unit], x one broadcast unit
//   V::requant        sat32(rshift(acc * m, s) + b) in every lane, exact in int64
//
// Included by one .cc per instruction set, each compiled with its own flags. Everything sits in an unnamed namespace and
// calls no inline function of the standard library: the linker keeps one copy of such a function, and it could be the
// copy a lesser CPU cannot run.
#pragma once
#include "depthwise.h"
#include "depthwise_pairs.h"
#include "depthwise_quads.h"

namespace bitspike {
namespace {

constexpr size_t kSlack = 64;  // codes that may be read, never used, past the end of scratch

// Packed convolution, per group: [blocks][kernel_h][steps / fields][lanes][unit] weights, then m, b and the first value of
// the accumulator, int32 [blocks * lanes] each, and whether requantization fits. Steps run through a kernel row, where
// kernel_w and channels run together in memory; the last ones are padded with zero weights.
template <class V>
struct Packing {
  typename V::Weight* weight;
  int32_t *m, *b, *start, *fits;
  size_t steps, block, bytes;

  Packing(const Conv& c, int group, const void* packed) {
    steps = round_up(static_cast<size_t>(c.kernel_w) * c.group_channels(), V::kUnit * V::kFields) / V::kUnit;
    block = c.kernel_h * steps / V::kFields * V::kLanes * V::kUnit;
    const size_t outputs = round_up(c.group_outputs(), V::kLanes);
    const size_t weights = round_up(outputs / V::kLanes * block * sizeof(typename V::Weight), 64);
    bytes = weights + round_up((3 * outputs + 1) * sizeof(int32_t), 64);
    char* p = static_cast<char*>(const_cast<void*>(packed)) + group * bytes;
    weight = reinterpret_cast<typename V::Weight*>(p);
    m = reinterpret_cast<int32_t*>(p + weights);
    b = m + outputs;
    start = b + outputs;
    fits = start + outputs;
  }
};

template <class V>
size_t tiles_packed_bytes(const Conv& c) {
  return c.groups * Packing<V>(c, 0, nullptr).bytes;
}

template <class V>
void tiles_pack(const Conv& c, void* packed) {
  memset(packed, 0, tiles_packed_bytes<V>(c));
  const int taps = c.kernel_h * c.kernel_w, in = c.group_channels(), outputs = c.group_outputs();
  const bool fits = requant_fits(c);
  const int32_t offset = c.kind == Kind::s8 ? V::kSignedOffset : V::kUnsignedOffset;
  for (int g = 0; g < c.groups; ++g) {
    const Packing<V> p(c, g, packed);
    *p.fits = fits;
    for (int o = 0; o < outputs; ++o) {
      const int8_t* w = c.weight + static_cast<size_t>(g * outputs + o) * taps * in;
      uint32_t sum = 0;
      for (int ky = 0; ky < c.kernel_h; ++ky)
        for (int k = 0; k < c.kernel_w * in; ++k, ++w) {
          const size_t step = ky * p.steps + k / V::kUnit, vector = step / V::kFields;
          V::put_weight(p.weight + o / V::kLanes * p.block + (vector * V::kLanes + o % V::kLanes) * V::kUnit + k % V::kUnit,
                        static_cast<int>(step % V::kFields), *w);
          sum += V::start(*w, offset);
        }
      p.m[o] = c.m[g * outputs + o];
      p.b[o] = c.b[g * outputs + o];
      // Modulo 2^32, as the dot product is: the true sum is below 2^31, so the result is exact.
      p.start[o] = static_cast<int32_t>(sum << V::kScaleBits);
    }
  }
}

inline bool two_bits(const Conv& c) { return c.weight_lo >= -2 && c.weight_hi <= 1; }

// The scaled accumulator must stay below 2^31 too.
template <class V>
bool narrow_supported(const Conv& c) {
  const int64_t code = c.most_code(), weight = c.most_weight();
  const int64_t products = int64_t{c.kernel_h} * c.kernel_w * c.group_channels();
  return may_support(Variant::narrow, c) && products * code * weight < int64_t{1} << (31 - V::template Narrow<2>::kScaleBits);
}

inline size_t padded_width(const Conv& c) { return static_cast<size_t>(c.width) + 2 * c.pad_w; }

template <class V>
size_t tiles_scratch_bytes(const Conv& c, int rows) {
  const size_t in_rows = static_cast<size_t>(rows - 1) * c.stride_h + c.kernel_h;
  const size_t codes = in_rows * padded_width(c) * c.group_channels() + kSlack;
  return codes * sizeof(typename V::Code);
}

// Rows [first, first + rows) of the padded image, channels [channel, channel + count) only. Put: (to, from, n) copies
// and converts a run of codes; Fill: one padding code.
template <class T, class Put, class Fill>
void pad_rows(const Conv& c, const uint8_t* image, int first, int rows, int channel, int count, T* to, Put put,
              Fill fill) {
  const auto pad = [&](size_t pixels) {
    for (size_t p = 0; p < pixels; ++p)
      for (int i = 0; i < count; ++i) *to++ = fill(c.pad_value[channel + i]);
  };
  for (int y = first; y < first + rows; ++y) {
    if (y < 0 || y >= c.height) {
      pad(padded_width(c));
      continue;
    }
    pad(c.pad_w);
    const uint8_t* row = image + static_cast<size_t>(y) * c.width * c.channels + channel;
    if (count == c.channels) {
      put(to, row, static_cast<size_t>(c.width) * count);
      to += static_cast<size_t>(c.width) * count;
    } else {
      for (int x = 0; x < c.width; ++x, row += c.channels, to += count) put(to, row, count);
    }
    pad(c.pad_w);
  }
  memset(to, 0, kSlack * sizeof(T));
}

// The sums of kPixels windows x (N * kLanes) outputs, [kPixels][N][kLanes]. x: the first code of each window; `row` codes between rows
// of the window; `block` weights and `start_step` first values between vectors of outputs. A function of its own, for its accumulators and
// pointers to have a register each whatever follows.
template <class V, int N>
BITSPIKE_NOINLINE void tile_sums(const typename V::Code* const* x, size_t row, int kernel_h, size_t steps, const typename V::Weight* w,
                                 size_t block, const int32_t* start, size_t start_step, int32_t* sums) {
  typename V::I32 acc[V::kPixels][N];
  for (int n = 0; n < N; ++n) {
    const typename V::I32 first = V::load(start + n * start_step);
    for (int i = 0; i < V::kPixels; ++i) acc[i][n] = first;
  }
  const typename V::Code *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
  for (int ky = 0; ky < kernel_h; ++ky) {
    for (size_t k = 0; k < steps * V::kUnit; w += V::kLanes * V::kUnit) {
      typename V::I32 packed[N], weights[N];
      for (int n = 0; n < N; ++n) packed[n] = V::load_weights(w + n * block);
      for (int field = 0; field < V::kFields; ++field, k += V::kUnit) {
        for (int n = 0; n < N; ++n) weights[n] = V::unpack(packed[n], field);
        const auto pixel = [&](typename V::I32* a, const typename V::Code* from) {
          const typename V::I32 codes = V::broadcast(from + k);
          for (int n = 0; n < N; ++n) a[n] = V::dot(a[n], codes, weights[n]);
        };
        pixel(acc[0], x0), pixel(acc[1], x1), pixel(acc[2], x2), pixel(acc[3], x3);
        if constexpr (V::kPixels > 4) pixel(acc[4], x4), pixel(acc[5], x5), pixel(acc[6], x6), pixel(acc[7], x7);
      }
    }
    x0 += row, x1 += row, x2 += row, x3 += row, x4 += row, x5 += row, x6 += row, x7 += row;
  }
  const auto put = [&](const typename V::I32* a) {
    for (int n = 0; n < N; ++n, sums += V::kLanes) V::store(sums, a[n], V::kLanes);
  };
  put(acc[0]), put(acc[1]), put(acc[2]), put(acc[3]);
  if constexpr (V::kPixels > 4) put(acc[4]), put(acc[5]), put(acc[6]), put(acc[7]);
}

// kPixels x (vectors * kLanes) outputs.
template <class V, class Finish>
void conv_block(const Conv& c, const Packing<V>& p, const typename V::Code* const* x, size_t row, int first, int vectors, int c_first,
                int pixels, const size_t* y, const Finish& write) {
  alignas(64) int32_t sums[V::kPixels * V::kVectors * V::kLanes];
  const auto run = vectors == 1 ? tile_sums<V, 1> : vectors == 2 ? tile_sums<V, 2> : tile_sums<V, V::kVectors>;
  run(x, row, c.kernel_h, p.steps, p.weight + first / V::kLanes * p.block, p.block, p.start + first, V::kLanes, sums);
  const int outputs = c.group_outputs();
  const typename V::Scale scale(c.shift);
  for (int n = 0; n < vectors; ++n) {
    const int o = first + n * V::kLanes;
    const Requantize<V, Finish> requantize(write, c_first + o, p.m + o, p.b + o);
    const auto all = [&](int lanes) {
      for (int i = 0; i < pixels; ++i)
        write(y[i] + o, c_first + o, lanes, requantize(V::unscale(V::load(sums + (i * vectors + n) * V::kLanes)), scale));
    };
    if (outputs - o >= V::kLanes) all(V::kLanes);  // a number that the compiler knows
    else all(outputs - o);
  }
}

// Pointers to the windows of up to kPixels output pixels; the last one is repeated to fill the block.
template <class V>
struct Windows {
  size_t offset[V::kPixels];
  int count;

  Windows(const Conv& c, int first, int pixels, size_t pixel_codes) {
    count = at_most(V::kPixels, pixels - first);
    int oy = first / c.out_width, ox = first % c.out_width;
    for (int i = 0; i < V::kPixels; ++i) {
      offset[i] = (oy * c.stride_h * padded_width(c) + static_cast<size_t>(ox) * c.stride_w) * pixel_codes;
      if (i + 1 < count && ++ox == c.out_width) ox = 0, ++oy;
    }
  }
};

template <class V, class Finish>
void tiles_rows(const Conv& c, const void* packed, const uint8_t* in, int row0, int row1, const Finish& write,
                void* scratch) {
  using Code = typename V::Code;
  const int pixels = (row1 - row0) * c.out_width;
  const int first_row = row0 * c.stride_h - c.pad_h, rows = (row1 - row0 - 1) * c.stride_h + c.kernel_h;
  const int channels = c.group_channels(), outputs = c.group_outputs();
  const size_t row = padded_width(c) * channels;
  for (int g = 0; g < c.groups; ++g) {
    const Code* codes = V::in_place(c, in, first_row, V::kUnit * V::kFields);
    if (!codes) {
      Code* to = static_cast<Code*>(scratch);
      const bool is_signed = c.kind == Kind::s8;
      pad_rows(c, in, first_row, rows, g * channels, channels, to,
               [=](Code* dst, const uint8_t* src, size_t n) { V::convert(dst, src, n, is_signed); },
               [=](int16_t v) { return static_cast<Code>(v + (is_signed ? V::kSignedOffset : V::kUnsignedOffset)); });
      codes = to;
    }
    const Packing<V> p(c, g, packed);
    const int blocks = (outputs + V::kLanes - 1) / V::kLanes;
    for (int block = 0; block < blocks;) {
      // 4 vectors are better split 2 + 2 than 3 + 1.
      const int left = blocks - block, n = left == 4 ? 2 : at_most(left, V::kVectors);
      for (int first = 0; first < pixels; first += V::kPixels) {
        const Windows<V> windows(c, first, pixels, channels);
        const Code* x[8];
        size_t y[8];
        for (int i = 0; i < 8; ++i) {
          x[i] = codes + windows.offset[i % V::kPixels];
          y[i] = (static_cast<size_t>(first) + at_most(i, windows.count - 1)) * c.outputs + g * outputs;
        }
        const int o = block * V::kLanes;
        conv_block<V>(c, p, x, row, o, n, g * outputs, windows.count, y, write);
      }
      block += n;
    }
  }
}

template <class V>
void conv_tiles(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                void* scratch) {
  const uint8_t* in = static_cast<const uint8_t*>(image);
  with_finish<V>(e, c.outputs, *Packing<V>(c, 0, packed).fits,
                 [&](const auto& write) { tiles_rows<V>(c, packed, in, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

template <class V>
constexpr ConvKernel tiles_kernel(bool (*supported)(const Conv&)) {
  return {supported, tiles_packed_bytes<V>, tiles_pack<V>, tiles_scratch_bytes<V>, conv_tiles<V>};
}

template <class V>
constexpr ConvKernel pairs_kernel() {
  return {nullptr, [](const Conv& c) { return PairPacking<V>(c, nullptr).bytes; }, pairs_pack<V>,
          [](const Conv& c, int) { return PairScratch<V>(c, nullptr).bytes; }, conv_pairs<V>};
}

template <class V>
constexpr ConvKernel quads_kernel() {
  return {nullptr, [](const Conv& c) { return QuadPacking<V>(c, nullptr).bytes; }, quads_pack<V>,
          [](const Conv& c, int) { return QuadScratch<V>(c, nullptr).bytes; }, conv_quads<V>};
}

template <class V>
constexpr ConvKernel depthwise_kernel() {
  return {nullptr, [](const Conv& c) { return DepthwisePacking<V>(c, nullptr).bytes(); }, depthwise_pack<V>,
          [](const Conv& c, int) { return depthwise_scratch_bytes<V>(c); }, conv_depthwise<V>};
}

// The ways of Variant::dense, which takes depthwise convolutions too.
template <class V>
ConvKernel dense_way(const Conv& c) {
  if (!c.depthwise()) return tiles_kernel<V>(nullptr);
  if constexpr (V::kQuads)
    if (quads_fit<V>(c)) return quads_kernel<V>();
  if constexpr (V::kPairs)
    if (pairs_fit<V>(c)) return pairs_kernel<V>();
  return depthwise_kernel<V>();
}

template <class V>
constexpr ConvKernel dense_kernel() {
  return {[](const Conv&) { return true; }, [](const Conv& c) { return dense_way<V>(c).packed_bytes(c); },
          [](const Conv& c, void* packed) { dense_way<V>(c).pack(c, packed); },
          [](const Conv& c, int rows) { return dense_way<V>(c).scratch_bytes(c, rows); },
          [](const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
            dense_way<V>(c).run(c, packed, image, row0, row1, e, scratch);
          }};
}

// Variant::narrow: V::Narrow<2> and V::Narrow<4> hold weights of so many bits.
template <class V>
constexpr ConvKernel narrow_kernel() {
  using Two = typename V::template Narrow<2>;
  using Four = typename V::template Narrow<4>;
  return {[](const Conv& c) { return narrow_supported<V>(c); },
          [](const Conv& c) { return (two_bits(c) ? tiles_packed_bytes<Two> : tiles_packed_bytes<Four>)(c); },
          [](const Conv& c, void* packed) { (two_bits(c) ? tiles_pack<Two> : tiles_pack<Four>)(c, packed); },
          [](const Conv& c, int rows) { return tiles_scratch_bytes<Four>(c, rows); },
          [](const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
            (two_bits(c) ? conv_tiles<Two> : conv_tiles<Four>)(c, packed, image, row0, row1, e, scratch);
          }};
}

}  // namespace
}  // namespace bitspike
