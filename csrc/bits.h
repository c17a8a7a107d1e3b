// Convolution of counts with weights -1 and +1 by AND and bit counts. With the bits of w as 1 for +1 and 0 for -1, and x
// split into bit planes, x = sum over p of 2^p x_p:
//
//   sum of w * x = 2 * sum over p of 2^p popcount(w & x_p) - sum of x
//
// The codes of a kernel row (kernel_w and channels run together in memory) stay together as bits, so a window of one
// channel wastes nothing but the rounding of its rows to 32 bits.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// Bytes of a pixel in one plane.
inline size_t pixel_bytes(const Conv& c) { return (static_cast<size_t>(c.channels) + 7) / 8; }

inline bool popcount_supported(const Conv& c) { return may_support(Variant::popcount, c) && c.groups == 1; }

// Packed: per block of kLanes outputs, [kernel_h][steps][lanes] words of 32 bits; then m and b, int32 [blocks * lanes]
// each, and whether requantization fits.
template <class V>
struct PopcountPacking {
  size_t steps, block, outputs, bytes;
  uint32_t* weight;
  int32_t *m, *b, *fits;

  PopcountPacking(const Conv& c, const void* packed) {
    steps = round_up(c.kernel_w * pixel_bytes(c), 4) / 4;
    block = c.kernel_h * steps * V::kLanes;
    outputs = round_up(c.outputs, V::kLanes);
    const size_t weights = outputs / V::kLanes * block;
    weight = static_cast<uint32_t*>(const_cast<void*>(packed));
    m = reinterpret_cast<int32_t*>(weight + weights);
    b = m + outputs;
    fits = b + outputs;
    bytes = (weights + 2 * outputs + 1) * sizeof(int32_t);
  }
};

template <class V>
size_t popcount_packed_bytes(const Conv& c) {
  return PopcountPacking<V>(c, nullptr).bytes;
}

template <class V>
void popcount_pack(const Conv& c, void* packed) {
  const PopcountPacking<V> p(c, packed);
  memset(packed, 0, p.bytes);
  const int8_t* w = c.weight;
  for (int o = 0; o < c.outputs; ++o)
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (int kx = 0; kx < c.kernel_w; ++kx)
        for (int i = 0; i < c.channels; ++i) {
          const size_t bit = kx * pixel_bytes(c) * 8 + i;
          uint32_t* word = p.weight + o / V::kLanes * p.block + (ky * p.steps + bit / 32) * V::kLanes + o % V::kLanes;
          *word |= uint32_t{*w++ > 0} << bit % 32;
        }
  memcpy(p.m, c.m, c.outputs * sizeof(int32_t));
  memcpy(p.b, c.b, c.outputs * sizeof(int32_t));
  *p.fits = requant_fits(c);
}

// Scratch: per plane the padded rows as bits; sums of codes per padded pixel, per column of a window, per window.
struct BitRows {
  size_t rows, width, row, plane, bytes;
  uint8_t* bits;
  int32_t *sums, *columns, *windows;

  BitRows(const Conv& c, int out_rows, void* scratch) {
    rows = static_cast<size_t>(out_rows - 1) * c.stride_h + c.kernel_h;
    width = static_cast<size_t>(c.width) + 2 * c.pad_w;
    row = width * pixel_bytes(c);
    plane = round_up(rows * row, 4) + 64;  // words are read past a window's end; what they hold meets zero weights
    sums = static_cast<int32_t*>(scratch);
    columns = sums + rows * width;
    windows = columns + width;
    bits = reinterpret_cast<uint8_t*>(windows + static_cast<size_t>(out_rows) * c.out_width);
    bytes = static_cast<size_t>(reinterpret_cast<char*>(bits + c.bit_planes() * plane) - static_cast<char*>(scratch));
  }
};

template <class V>
size_t popcount_scratch_bytes(const Conv& c, int rows) {
  return BitRows(c, rows, nullptr).bytes + round_up(c.channels, V::kBytes);
}

// The bits of one pixel, plane by plane; returns the sum of its codes. kWhole: its channels are whole vectors.
template <class V, bool kWhole>
int32_t pixel_bits(const Conv& c, const uint8_t* codes, int planes, size_t plane, uint8_t* bits) {
  int32_t sum = 0;
  for (int i = 0; i < c.channels; i += V::kBytes, bits += V::kBytes / 8) {
    const int n = kWhole ? V::kBytes : at_most(c.channels - i, V::kBytes);
    const typename V::I32 v = V::load_codes(codes + i, n);
    for (int p = 0; p < planes; ++p) {
      const uint64_t mask = V::plane(v, p);
      sum += V::count_bits(mask) << p;
      if (n == V::kBytes) memcpy(bits + p * plane, &mask, V::kBytes / 8);
      else if (n == V::kBytes / 2) memcpy(bits + p * plane, &mask, V::kBytes / 16);
      else memcpy(bits + p * plane, &mask, (n + 7) / 8);
    }
  }
  return sum;
}

template <class V, bool kWhole>
void rows_of_bits(const Conv& c, const uint8_t* image, int first, const BitRows& to, const uint8_t* pad) {
  const int planes = c.bit_planes(), right = c.pad_w + c.width;
  const size_t size = pixel_bytes(c);
  for (size_t r = 0; r < to.rows; ++r) {
    const int iy = first + static_cast<int>(r);
    const bool inside = iy >= 0 && iy < c.height;
    const uint8_t* from = inside ? image + static_cast<size_t>(iy) * c.width * c.channels : pad;
    uint8_t* bits = to.bits + r * to.row;
    int32_t* sums = to.sums + r * to.width;
    for (int x = 0; x < static_cast<int>(to.width); ++x, bits += size) {
      const bool here = inside && x >= c.pad_w && x < right;
      sums[x] = pixel_bits<V, kWhole>(c, here ? from : pad, planes, to.plane, bits);
      if (here) from += c.channels;
    }
  }
}

template <class V>
void make_bits(const Conv& c, const uint8_t* image, int first, const BitRows& to) {
  const int planes = c.bit_planes();
  uint8_t* pad = to.bits + planes * to.plane;
  for (int i = 0; i < c.channels; ++i) pad[i] = static_cast<uint8_t>(c.pad_value[i]);
  for (int p = 0; p < planes; ++p) memset(to.bits + p * to.plane + to.rows * to.row, 0, to.plane - to.rows * to.row);
  if (c.channels % V::kBytes == 0) rows_of_bits<V, true>(c, image, first, to, pad);
  else rows_of_bits<V, false>(c, image, first, to, pad);
  int32_t* window = to.windows;
  for (size_t oy = 0; oy * c.stride_h + c.kernel_h <= to.rows; ++oy, window += c.out_width) {
    const int32_t* sums = to.sums + oy * c.stride_h * to.width;  // first down the columns, then along the row
    memcpy(to.columns, sums, to.width * sizeof(int32_t));
    for (int ky = 1; ky < c.kernel_h; ++ky)
      for (size_t x = 0; x < to.width; ++x) to.columns[x] += sums[ky * to.width + x];
    memset(window, 0, c.out_width * sizeof(int32_t));
    for (int kx = 0; kx < c.kernel_w; ++kx)
      if (c.stride_w == 1)
        for (int ox = 0; ox < c.out_width; ++ox) window[ox] += to.columns[ox + kx];
      else
        for (int ox = 0; ox < c.out_width; ++ox) window[ox] += to.columns[static_cast<size_t>(ox) * c.stride_w + kx];
  }
}

// kPixels windows times N vectors of outputs, from output `first` on. x: where each window starts in plane 0; y: where
// its outputs go; sums: of its codes.
template <class V, int N, class Finish>
void popcount_block(const Conv& c, const PopcountPacking<V>& p, const BitRows& rows, const uint8_t* const* x,
                    const size_t* y, const int32_t* sums, int count, int first, const typename V::Scale& scale,
                    const Finish& write) {
  typename V::I32 acc[V::kPixels][N];
  for (int i = 0; i < V::kPixels; ++i)
    for (int n = 0; n < N; ++n) acc[i][n] = V::zero();
  for (int plane = c.bit_planes() - 1; plane >= 0; --plane) {
    for (int i = 0; i < V::kPixels; ++i)
      for (int n = 0; n < N; ++n) acc[i][n] = V::add(acc[i][n], acc[i][n]);
    const uint32_t* w = p.weight + first / V::kLanes * p.block;
    size_t at = plane * rows.plane;
    for (int ky = 0; ky < c.kernel_h; ++ky, at += rows.row)
      for (size_t step = 0; step < p.steps; ++step, w += V::kLanes) {
        typename V::I32 weights[N];
        for (int n = 0; n < N; ++n) weights[n] = V::load(reinterpret_cast<const int32_t*>(w + n * p.block));
        for (int i = 0; i < V::kPixels; ++i) {
          const typename V::I32 codes = V::broadcast32(x[i] + at + 4 * step);
          for (int n = 0; n < N; ++n) acc[i][n] = V::count_and(acc[i][n], codes, weights[n]);
        }
      }
  }
  for (int n = 0; n < N; ++n) {
    const int o = first + n * V::kLanes;
    const Requantize<V, Finish> requantize(write, o, p.m + o, p.b + o);
    for (int i = 0; i < V::kPixels; ++i)
      if (i < count)
        write(y[i] + o, o, at_most(c.outputs - o, V::kLanes),
              requantize(V::sub(V::add(acc[i][n], acc[i][n]), V::splat(sums[i])), scale));
  }
}

template <class V, class Finish>
void popcount_rows(const Conv& c, const PopcountPacking<V>& p, const BitRows& rows, int pixels, const Finish& write) {
  const typename V::Scale scale(c.shift);
  const int blocks = static_cast<int>(p.outputs) / V::kLanes;
  for (int block = 0; block < blocks;) {
    const int left = blocks - block, n = left == 4 ? 2 : at_most(left, V::kVectors);
    for (int first = 0; first < pixels; first += V::kPixels) {
      const int count = at_most(V::kPixels, pixels - first);
      const uint8_t* x[V::kPixels];
      size_t y[V::kPixels];
      int32_t sums[V::kPixels];
      for (int i = 0; i < V::kPixels; ++i) {
        const int pixel = first + at_most(i, count - 1), oy = pixel / c.out_width, ox = pixel % c.out_width;
        x[i] = rows.bits + static_cast<size_t>(oy) * c.stride_h * rows.row +
               static_cast<size_t>(ox) * c.stride_w * pixel_bytes(c);
        y[i] = static_cast<size_t>(pixel) * c.outputs;
        sums[i] = rows.windows[pixel];
      }
      const int o = block * V::kLanes;
      if (V::kVectors == 3 && n == 3) popcount_block<V, V::kVectors>(c, p, rows, x, y, sums, count, o, scale, write);
      else if (n == 2) popcount_block<V, 2>(c, p, rows, x, y, sums, count, o, scale, write);
      else popcount_block<V, 1>(c, p, rows, x, y, sums, count, o, scale, write);
    }
    block += n;
  }
}

template <class V>
void conv_popcount(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                   void* scratch) {
  const PopcountPacking<V> p(c, packed);
  const BitRows rows(c, row1 - row0, scratch);
  make_bits<V>(c, static_cast<const uint8_t*>(image), row0 * c.stride_h - c.pad_h, rows);
  const int pixels = (row1 - row0) * c.out_width;
  with_finish<V>(e, c.outputs, *p.fits, [&](const auto& write) { popcount_rows<V>(c, p, rows, pixels, write); });
  count_nonzero<V>(e, static_cast<size_t>(pixels) * c.outputs);
}

template <class V>
constexpr ConvKernel popcount_kernel() {
  return {popcount_supported, popcount_packed_bytes<V>, popcount_pack<V>, popcount_scratch_bytes<V>, conv_popcount<V>};
}

}  // namespace
}  // namespace bitspike
