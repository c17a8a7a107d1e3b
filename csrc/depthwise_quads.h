// Depthwise convolution of stride 1 by dot products: a lane holds the codes of a channel in four rows of a column, a *quad*. The quad that
// begins a row below is the same one, moved on by a byte, with the code of a new row at its end: one instruction; and it is loaded once for
// all outputs of a row whose windows go over its column, while the weights of kLanes channels stay in registers (AVX-512).
//
// Sums are of 32 bits from the first product on, so that any weights will do.
#pragma once
#include "padded_row.h"

namespace bitspike {
namespace {

constexpr int kQuad = 4;                          // rows
constexpr int kManyPixels = 14, kSomePixels = 8;  // outputs at a time
constexpr int kQuadColumns = 28;                  // of outputs at most, so that what their windows read stays in the nearest cache

template <class V>
bool quads_fit(const Conv& c) {
  if (c.stride_h != 1 || c.stride_w != 1 || (c.kernel_w != 3 && c.kernel_w != 5 && c.kernel_w != 7)) return false;
  return c.kernel_h >= 2 && c.kernel_h <= 2 * kQuad;
}

// Packed: per kLanes channels the weights [groups][kernel_w][kLanes][kQuad], then start, m and b, int32 [channels, rounded up to kBytes], and
// whether requantization fits. A window is the quads that end at its fourth and at its last row, or only the latter; a row that is in both, or
// in a quad but not in the window, has a weight of 0 there.
template <class V>
struct QuadPacking {
  int groups;
  size_t vectors, bytes;  // vectors of weights per kLanes channels
  int8_t* weight;
  int32_t *start, *m, *b, *fits;

  QuadPacking(const Conv& c, const void* packed) {
    groups = c.kernel_h > kQuad ? 2 : 1;
    vectors = static_cast<size_t>(groups) * c.kernel_w;
    const size_t channels = round_up(c.channels, V::kBytes);
    weight = static_cast<int8_t*>(const_cast<void*>(packed));
    start = reinterpret_cast<int32_t*>(weight + channels * kQuad * vectors);
    m = start + channels;
    b = m + channels;
    fits = b + channels;
    bytes = channels * (kQuad * vectors + 3 * sizeof(int32_t)) + 64;
  }
};

template <class V>
void quads_pack(const Conv& c, void* packed) {
  const QuadPacking<V> p(c, packed);
  memset(packed, 0, p.bytes);
  *p.fits = requant_fits(c);
  for (int o = 0; o < c.channels; ++o) {
    int8_t* const first = p.weight + (o / V::kLanes * p.vectors * V::kLanes + o % V::kLanes) * kQuad;
    int32_t sum = 0;
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (int kx = 0; kx < c.kernel_w; ++kx) {
        const int8_t w = c.weight[(static_cast<size_t>(o) * c.kernel_h + ky) * c.kernel_w + kx];
        const int group = p.groups > 1 && ky >= kQuad ? 1 : 0, last = group + 1 < p.groups ? kQuad : c.kernel_h;
        first[static_cast<size_t>(group * c.kernel_w + kx) * V::kLanes * kQuad + kQuad + ky - last] = w;
        sum += w;
      }
    p.start[o] = c.kind == Kind::s8 ? -V::kSignedOffset * sum : 0;
    p.m[o] = c.m[o];
    p.b[o] = c.b[o];
  }
}

// Whether sums are made together with the quads: see quads_of_three.
inline bool three_columns(const Conv& c) { return c.kernel_w == 3 && c.kernel_h <= kQuad; }

// For kBytes channels: the newest row, [width][kBytes], the quads that are still needed, [rows][kBytes / kLanes][width][kLanes], and the sums
// of a row of a stretch of outputs, [outputs][kBytes].
template <class V>
struct QuadScratch {
  int outputs, pixels, rows;  // of a stretch; at a time; of quads
  size_t width, row, bytes;   // columns that the windows of a stretch span; bytes of a row of quads
  uint8_t *line, *quads;
  int32_t* sums;

  QuadScratch(const Conv& c, void* scratch) {
    const int stretches = (c.out_width + kQuadColumns - 1) / kQuadColumns, least = (c.out_width + stretches - 1) / stretches;
    pixels = three_columns(c) ? 1 : round_up(least, kManyPixels) <= round_up(least, kSomePixels) ? kManyPixels : kSomePixels;
    outputs = static_cast<int>(round_up(least, pixels));
    rows = c.kernel_h > kQuad ? c.kernel_h - kQuad + 1 : 1;
    width = columns(c, outputs);
    row = width * V::kBytes * kQuad;
    line = static_cast<uint8_t*>(scratch);
    quads = line + width * V::kBytes;
    sums = reinterpret_cast<int32_t*>(quads + rows * row);
    bytes = width * V::kBytes + rows * row + outputs * V::kBytes * sizeof(int32_t);
  }
  size_t columns(const Conv& c, int some) const { return round_up(some, pixels) + c.kernel_w - 1; }
  uint8_t* ending(const Conv& c, int y) const { return quads + (y + c.pad_h) % rows * row; }  // quads whose last row is y
};

// Row y of the padded image, columns [left, left + count), `lanes` channels from `channel` on, as unsigned codes.
template <class V>
void quad_line(const Conv& c, const uint8_t* image, int y, int left, size_t count, int channel, int lanes, typename V::I32 pad, uint8_t* to) {
  const auto put = [&](typename V::I32 v) {
    V::store_bytes(to, v);
    to += V::kBytes;
  };
  padded_row<V>(c, image, y, left, count, channel, lanes, pad, put);
}

// `count` quads one row on, of kVectors * kLanes channels.
template <class V, int kVectors>
BITSPIKE_NOINLINE void quads_on(const uint8_t* line, const uint8_t* before, size_t width, size_t count, uint8_t* to) {
  const typename V::NextQuad next;
  const size_t step = width * V::kBytes;
  for (const uint8_t* const end = line + count * V::kBytes; line < end; line += V::kBytes, before += V::kBytes, to += V::kBytes) {
    typename V::I32 quad[kVectors];
    for (int n = 0; n < kVectors; ++n) quad[n] = next(V::load_bytes(reinterpret_cast<const int8_t*>(before + n * step)), line + n * V::kLanes);
    for (int n = 0; n < kVectors; ++n) V::store_bytes(to + n * step, quad[n]);
  }
}

// What to do with the sums of output x of a row, kBytes channels: codes, or nothing yet.
template <class V, class Finish>
struct PutCodes {
  FloatCodes<V, kQuad, Finish::kMade == Made::twice> codes;
  typename V::JoinedCodes join;
  uint8_t* to;
  size_t step;
  int lanes;
  PutCodes(const Conv& c, const Finish& write, int channel, int some, size_t y)
      : codes(write.direct, channel), join(write.direct.lo, write.direct.hi), to(write.codes + y), step(c.channels), lanes(some) {}
  BITSPIKE_INLINE void operator()(int x, const typename V::I32 (&sums)[kQuad]) const {
    const typename V::I32 four[kQuad] = {codes(0, sums[0]), codes(1, sums[1]), codes(2, sums[2]), codes(3, sums[3])};
    if (lanes == V::kBytes) join.store(four, to + x * step, V::kBytes);  // a number that the compiler knows
    else join.store(four, to + x * step, lanes);
  }
};
template <class V>
struct PutSums {
  int32_t* to;
  BITSPIKE_INLINE void operator()(int x, const typename V::I32 (&sums)[kQuad]) const {
    for (int n = 0; n < kQuad; ++n) V::store(to + x * V::kBytes + n * V::kLanes, sums[n], V::kLanes);
  }
};

// A column of quads, one row on, and its products in windows of three columns.
template <class V, int kVectors>
struct ThreeColumns {
  using I32 = typename V::I32;
  using Sums = I32 (&)[kQuad];
  typename V::NextQuad next;
  I32 taps[kVectors][3];
  const int32_t* start;

  ThreeColumns(const int8_t* weight, const int32_t* first) : start(first) {
    for (int n = 0; n < kVectors; ++n)
      for (int k = 0; k < 3; ++k) taps[n][k] = V::opaque(V::load_bytes(weight + (n * 3 + k) * V::kBytes));
  }
  // It is the last column of one window, the middle one of another, and the first one of a third.
  BITSPIKE_INLINE void operator()(const uint8_t* line, uint8_t* quads, size_t step, Sums last, Sums middle, Sums first) const {
    for (int n = 0; n < kVectors; ++n, quads += step) {
      const I32 quad = next(V::load_bytes(reinterpret_cast<const int8_t*>(quads)), line + n * V::kLanes);
      V::store_bytes(quads, quad);
      last[n] = V::dot(last[n], quad, taps[n][2]);
      middle[n] = V::dot(middle[n], quad, taps[n][1]);
      first[n] = V::dot(V::load(start + n * V::kLanes), quad, taps[n][0]);
    }
  }
};

// Quads one row on, and with them the sums of `count` outputs whose windows have three columns and no more rows than a quad.
template <class V, int kVectors, class Each>
BITSPIKE_NOINLINE void quads_of_three(const uint8_t* line, uint8_t* quads, size_t width, int count, const int8_t* weight, const int32_t* start,
                                      const Each& what) {
  const Each each = what;  // a copy, for the compiler to know that no code that is stored changes it
  const ThreeColumns<V, kVectors> column(weight, start);
  const size_t step = width * V::kBytes;
  typename V::I32 a[kQuad], b[kQuad], c[kQuad];
  for (int n = 0; n < kQuad; ++n) a[n] = b[n] = c[n] = V::zero();
  column(line, quads, step, b, c, a);
  column(line + V::kBytes, quads + V::kBytes, step, c, a, b);
  for (int x = 0;;) {  // three at a time, so that no sums are moved
    line += 2 * V::kBytes, quads += 2 * V::kBytes;
    column(line, quads, step, a, b, c);
    each(x, a);
    if (++x == count) return;
    line += V::kBytes, quads += V::kBytes;
    column(line, quads, step, b, c, a);
    each(x, b);
    if (++x == count) return;
    column(line + V::kBytes, quads + V::kBytes, step, c, a, b);
    each(x, c);
    if (++x == count) return;
  }
}

template <class V, class Each>
void quads_of_three(int vectors, const uint8_t* line, uint8_t* quads, size_t width, int count, const int8_t* weight, const int32_t* start,
                    const Each& each) {
  const auto run = vectors == 4 ? quads_of_three<V, 4, Each> : vectors == 3 ? quads_of_three<V, 3, Each> : vectors == 2 ? quads_of_three<V, 2, Each>
                                                                                                           : quads_of_three<V, 1, Each>;
  run(line, quads, width, count, weight, start, each);
}

// Sums of `count` outputs of a row for kLanes channels, kBytes apart.
template <class V, int kWidth, int kGroups, int kPixels>
BITSPIKE_NOINLINE void quad_sums(const uint8_t* upper, const uint8_t* lower, size_t count, const int8_t* weight, const int32_t* start, int32_t* sums) {
  using I32 = typename V::I32;
  I32 taps[kGroups][kWidth];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) taps[g][k] = V::opaque(V::load_bytes(weight + (g * kWidth + k) * V::kBytes));
  for (size_t x = 0; x < count; x += kPixels) {
    I32 acc[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) acc[i] = V::load(start);
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const uint8_t* from = (g ? lower : upper) + x * V::kBytes;
#pragma GCC unroll 32
      for (int j = 0; j < kPixels + kWidth - 1; ++j) {
        const I32 quad = V::load_bytes(reinterpret_cast<const int8_t*>(from + j * V::kBytes));
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k)
          if (j - k >= 0 && j - k < kPixels) acc[j - k] = V::dot(acc[j - k], quad, taps[g][k]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i, sums += V::kBytes) V::store(sums, acc[i], V::kLanes);
  }
}

// Whether codes of potentials are all that is written.
template <class Finish>
constexpr bool codes_only() {
  if constexpr (Finish::kUsualCodes) return Finish::kSum == Added::nothing && !Finish::kKept;
  return false;
}

// What becomes of a row of sums, [width][kBytes].
template <class V, class Finish>
void quads_finish(const Conv& c, const QuadPacking<V>& p, const int32_t* sums, int width, int channel, int lanes, size_t y, const Finish& write,
                  const typename V::Scale& scale) {
  if constexpr (by_floats(Finish::kMade)) {
    const PutCodes<V, Finish> put(c, write, channel, lanes, y);
    for (int x = 0; x < width; ++x, sums += V::kBytes) {
      const typename V::I32 four[kQuad] = {V::load(sums), V::load(sums + V::kLanes), V::load(sums + 2 * V::kLanes), V::load(sums + 3 * V::kLanes)};
      put(x, four);
    }
  } else if constexpr (codes_only<Finish>()) {
    using R = Requantize<V, Finish>;
    const R requantize[kQuad] = {R(write, channel, p.m + channel, p.b + channel), R(write, channel, p.m + channel + V::kLanes, p.b + channel + V::kLanes),
                                 R(write, channel, p.m + channel + 2 * V::kLanes, p.b + channel + 2 * V::kLanes),
                                 R(write, channel, p.m + channel + 3 * V::kLanes, p.b + channel + 3 * V::kLanes)};
    const typename V::JoinedCodes join(write.lo(), write.hi());
    const auto all = [&](int there) {
      uint8_t* to = write.codes + y;
      for (int x = 0; x < width; ++x, sums += V::kBytes, to += c.channels) {
        typename V::I32 four[kQuad];
        for (int n = 0; n < kQuad; ++n) {
          const int left = there - n * V::kLanes, some = left < 0 ? 0 : at_most(left, V::kLanes);
          four[n] = write.code(channel + n * V::kLanes, some, requantize[n](V::load(sums + n * V::kLanes), scale));
        }
        join.store(four, to, there);
      }
    };
    if (lanes == V::kBytes) all(V::kBytes);  // a number that the compiler knows
    else all(lanes);
  } else {
    for (int first = 0; first < lanes; first += V::kLanes) {
      const int o = channel + first;
      const Requantize<V, Finish> requantize(write, o, p.m + o, p.b + o);
      const auto all = [&](int some) {
        size_t to = y + first;
        for (int x = 0; x < width; ++x, to += c.channels) write(to, o, some, requantize(V::load(sums + x * V::kBytes + first), scale));
      };
      if (lanes - first >= V::kLanes) all(V::kLanes);  // a number that the compiler knows
      else all(lanes - first);
    }
  }
}

template <class V, int kPixels>
auto quad_sums_of(const Conv& c) {
  if (c.kernel_h <= kQuad) return c.kernel_w == 5 ? quad_sums<V, 5, 1, kPixels> : quad_sums<V, 7, 1, kPixels>;
  return c.kernel_w == 3 ? quad_sums<V, 3, 2, kPixels> : c.kernel_w == 5 ? quad_sums<V, 5, 2, kPixels> : quad_sums<V, 7, 2, kPixels>;
}

template <class V, class Finish>
void quads_rows(const Conv& c, const QuadPacking<V>& p, const uint8_t* image, int row0, int row1, const Finish& write, void* scratch) {
  const QuadScratch<V> s(c, scratch);
  const typename V::Scale scale(c.shift);
  const auto sum = s.pixels == kManyPixels ? quad_sums_of<V, kManyPixels>(c) : quad_sums_of<V, kSomePixels>(c);
  const bool three = three_columns(c);
  for (int channel = 0; channel < c.channels; channel += V::kBytes) {
    const int lanes = at_most(c.channels - channel, V::kBytes), vectors = (lanes + V::kLanes - 1) / V::kLanes;
    const auto on = vectors == 4 ? quads_on<V, 4> : vectors == 3 ? quads_on<V, 3> : vectors == 2 ? quads_on<V, 2> : quads_on<V, 1>;
    const int8_t* weight = p.weight + channel * kQuad * p.vectors;
    const int32_t* start = p.start + channel;
    const typename V::I32 pad = pad_of<V>(c, channel, lanes);
    for (int left = 0; left < c.out_width; left += s.outputs) {
      const int width = at_most(c.out_width - left, s.outputs);
      const size_t columns = s.columns(c, width);
      int listed = row0 - c.pad_h;
      for (int oy = row0; oy < row1; ++oy) {
        const int bottom = oy - c.pad_h + c.kernel_h - 1;
        const size_t y = (static_cast<size_t>(oy - row0) * c.out_width + left) * c.channels + channel;
        for (; listed <= bottom; ++listed) {  // the first quads go on from no others: what they have of those is 0 times, or overwritten
          quad_line<V>(c, image, listed, left - c.pad_w, columns, channel, lanes, pad, s.line);
          if (three && listed == bottom) continue;  // made with the sums
          on(s.line, s.ending(c, listed == -c.pad_h ? listed : listed - 1), s.width, columns, s.ending(c, listed));
        }
        if (three) {
          if constexpr (by_floats(Finish::kMade)) {
            quads_of_three<V>(vectors, s.line, s.quads, s.width, width, weight, start, PutCodes<V, Finish>(c, write, channel, lanes, y));
            continue;
          }
          quads_of_three<V>(vectors, s.line, s.quads, s.width, width, weight, start, PutSums<V>{s.sums});
        } else {
          const uint8_t *upper = s.ending(c, p.groups > 1 ? bottom - c.kernel_h + kQuad : bottom), *lower = s.ending(c, bottom);
          for (int n = 0; n < vectors; ++n, upper += s.width * V::kBytes, lower += s.width * V::kBytes)
            sum(upper, lower, width, weight + n * p.vectors * V::kBytes, start + n * V::kLanes, s.sums + n * V::kLanes);
        }
        quads_finish<V>(c, p, s.sums, width, channel, lanes, y, write, scale);
      }
    }
  }
}

template <class V>
void conv_quads(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
  const QuadPacking<V> p(c, packed);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  with_finish<V>(e, c.outputs, *p.fits, [&](const auto& write) { quads_rows<V>(c, p, codes, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

}  // namespace
}  // namespace bitspike
