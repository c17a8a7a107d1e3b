// Convolution of 3x3, stride 1, with fewer products than outputs and weights ask for: Winograd's F(2, 3) along columns, and F(2, 3) or
// F(4, 3) along rows. 16 products where four outputs have 36, or 24 where eight have 72; and no rounding, because everything stays
// whole: with factors f that clear the fractions,
//
//   f Y = A' (U . V) A,   U = G' g G,   V = B' d B      d: codes, g: weights, Y: sums of a tile, all of them integers
//
//   F(2, 3): 2 G = 2 0  0    B' = 1  0 -1  0    A' = 1 1  1  0         F(4, 3): B' = 4  0 -5  0  1  0    G = 1  0 0 / 4
//                  1 1  1         0  1  1  0         0 1 -1 -1                      0 -4 -4  1  1  0        1  1 1 / -6
//                  1 -1 1         0 -1  1  0                                        0  4 -4 -1  1  0        1 -1 1 / -6
//                  0 0  2         0  1  0 -1                                        0 -2 -1  2  1  0        1  2 4 / 24
//                                                                                   0  2 -1 -2  1  0        1 -2 4 / 24
//   A' of F(4, 3): 1 1 1 1 1 0, 0 1 -1 2 -2 0, 0 1 1 4 4 0, 0 1 -1 8 -8 1           0  4  0 -5  0  1        0  0 1
//
// Bounds. U must fit into 8 bits: F(2, 3) twice makes at most 9 times the largest weight of it, so weights lie in -14..14; the other
// way at most 21 times, but describe_weights looks at the weights themselves. V must fit into 8 bits: the sum or difference of two codes
// less one of two lies in -126..126 for codes up to 63, at place (1, 1) the sum of four in 0..252; F(4, 3) along rows makes
// -16 hi .. 10 hi of sums, so codes up to 7. Offsets of signed and of unsigned codes make of them what V::dot takes. Sums over
// channels are 4 Y, or 48, 24 and 12 Y, after A on both sides, without a remainder; may_support and describe_weights bound them.
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015, sections 4.1 and 4.2 (with row 2 of B' of F(2, 3) as there).
#pragma once
#include "tiles.h"

namespace bitspike {
namespace {

constexpr size_t kWinogradBytes = 256 << 10;      // of transformed codes at a time: a quarter of a second-level cache
constexpr size_t kMostTiles = 64;
constexpr size_t kColumnCodes = 32;  // worked on together

// Tiles of 2x2 outputs.
struct SquareTile {
  static constexpr int kColumns = 2, kInputs = 4, kPlaces = 16, kUnsignedPlace = 5;  // (1, 1)
  static void weights(const int* k, int* u) {
    u[0] = 2 * k[0], u[1] = k[0] + k[1] + k[2], u[2] = k[0] - k[1] + k[2], u[3] = 2 * k[2];
  }
  // B from the right on columns of codes, `channels` apart; `step` between places.
  template <class Code>
  static void columns(const Code* __restrict d, size_t channels, size_t count, int plain, int summed, Code* __restrict to, size_t step) {
    const Code *__restrict d1 = d + channels, *__restrict d2 = d1 + channels, *__restrict d3 = d2 + channels;
    Code *__restrict t1 = to + step, *__restrict t2 = t1 + step, *__restrict t3 = t2 + step;
    for (size_t i = 0; i < count; ++i) {
      to[i] = static_cast<Code>(d[i] - d2[i] + plain);
      t1[i] = static_cast<Code>(d1[i] + d2[i] + summed);
      t2[i] = static_cast<Code>(d2[i] - d1[i] + plain);
      t3[i] = static_cast<Code>(d1[i] - d3[i] + plain);
    }
  }
  template <class V>
  BITSPIKE_INLINE static void outputs(const typename V::I32* h, typename V::I32* y) {
    y[0] = V::shift_right(V::add(h[0], V::add(h[1], h[2])), 2);
    y[1] = V::shift_right(V::sub(V::sub(h[1], h[2]), h[3]), 2);
  }
};

// Tiles of 2 rows and 4 columns.
struct WideTile {
  static constexpr int kColumns = 4, kInputs = 6, kPlaces = 24, kUnsignedPlace = -1;
  static void weights(const int* k, int* u) {
    u[0] = k[0], u[1] = k[0] + k[1] + k[2], u[2] = k[0] - k[1] + k[2];
    u[3] = k[0] + 2 * k[1] + 4 * k[2], u[4] = k[0] - 2 * k[1] + 4 * k[2], u[5] = k[2];
  }
  template <class Code>
  static void columns(const Code* __restrict d, size_t channels, size_t count, int plain, int, Code* __restrict to, size_t step) {
    const Code *__restrict d1 = d + channels, *__restrict d2 = d1 + channels, *__restrict d3 = d2 + channels;
    const Code *__restrict d4 = d3 + channels, *__restrict d5 = d4 + channels;
    Code *__restrict t1 = to + step, *__restrict t2 = t1 + step, *__restrict t3 = t2 + step;
    Code *__restrict t4 = t3 + step, *__restrict t5 = t4 + step;
    const auto twice = [](Code v) { return static_cast<Code>(v + v); };  // there is no shift of bytes
    const auto plus = [](Code a, Code b) { return static_cast<Code>(a + b); };
    const auto less = [](Code a, Code b) { return static_cast<Code>(a - b); };
    const Code offset = static_cast<Code>(plain);
#pragma GCC ivdep
    for (size_t i = 0; i < count; ++i) {
      const Code four0 = twice(twice(d[i])), four1 = twice(twice(d1[i])), four2 = twice(twice(d2[i]));
      const Code five2 = plus(four2, d2[i]), five3 = plus(twice(twice(d3[i])), d3[i]), last = plus(d4[i], offset);
      const Code near = less(last, four2), turn = less(four1, d3[i]), far = less(last, d2[i]), steep = twice(less(d3[i], d1[i]));
      to[i] = plus(less(four0, five2), last);
      t1[i] = less(near, turn);
      t2[i] = plus(near, turn);
      t3[i] = plus(far, steep);
      t4[i] = less(far, steep);
      t5[i] = plus(less(four1, five3), plus(d5[i], offset));
    }
  }
  // 48, 24, 12 and 12 times the outputs; a third of a multiple of three is its product with the inverse of 3 modulo 2^32.
  template <class V>
  BITSPIKE_INLINE static void outputs(const typename V::I32* h, typename V::I32* y) {
    using I32 = typename V::I32;
    const I32 third = V::splat(static_cast<int32_t>(0xaaaaaaabu));
    const auto twice = [](I32 v) { return V::add(v, v); };
    const I32 s = V::add(h[1], h[2]), d = V::sub(h[1], h[2]), far = V::add(h[3], h[4]), turn = V::sub(h[3], h[4]);
    const I32 first = twice(V::sub(V::add(h[0], twice(h[0])), twice(s))), last = twice(V::add(h[5], twice(h[5])));
    y[0] = V::shift_right(V::multiply(V::add(first, far), third), 4);
    y[1] = V::shift_right(V::multiply(V::sub(turn, twice(d)), third), 3);
    y[2] = V::shift_right(V::multiply(V::sub(far, s), third), 2);
    y[3] = V::shift_right(V::multiply(V::add(V::sub(twice(turn), d), last), third), 2);
  }
};

// Packed: weights [vectors][places][steps][lanes][unit], then the first value of the sums, int32 [vectors][places][lanes], m and
// b, int32 [vectors * lanes], and whether requantization fits.
template <class V, class T>
struct WinogradPacking {
  static constexpr int kPlaces = T::kPlaces;
  typename V::Weight* weight;
  int32_t *start, *m, *b, *fits;
  size_t steps, place, vectors, bytes;  // place: weights of a vector of outputs at one place

  WinogradPacking(const Conv& c, const void* packed) {
    steps = round_up(c.channels, V::kUnit) / V::kUnit;
    place = steps * V::kLanes * V::kUnit;
    vectors = round_up(c.outputs, V::kLanes) / V::kLanes;
    const size_t weights = round_up(vectors * kPlaces * place * sizeof(typename V::Weight), 64);
    char* p = static_cast<char*>(const_cast<void*>(packed));
    weight = reinterpret_cast<typename V::Weight*>(p);
    start = reinterpret_cast<int32_t*>(p + weights);
    m = start + vectors * kPlaces * V::kLanes;
    b = m + vectors * V::kLanes;
    fits = b + vectors * V::kLanes;
    bytes = weights + round_up(((kPlaces + 2) * vectors * V::kLanes + 1) * sizeof(int32_t), 64);
  }
};

template <class V, class T>
constexpr int32_t winograd_offset(int place) {
  return place == T::kUnsignedPlace ? V::kUnsignedOffset : V::kSignedOffset;
}

template <class V, class T>
void winograd_pack(const Conv& c, void* packed) {
  constexpr int kPlaces = T::kPlaces;
  const WinogradPacking<V, T> p(c, packed);
  memset(packed, 0, p.bytes);
  *p.fits = requant_fits(c);
  for (int o = 0; o < c.outputs; ++o) {
    const size_t vector = o / V::kLanes, lane = o % V::kLanes;
    typename V::Weight* const to = p.weight + vector * kPlaces * p.place + lane * V::kUnit;
    const int8_t* g = c.weight + static_cast<size_t>(o) * 9 * c.channels;
    uint32_t sum[kPlaces] = {};
    for (int i = 0; i < c.channels; ++i) {
      int rows[4][3];
      for (int k = 0; k < 3; ++k) {
        const int g0 = g[k * c.channels + i], g1 = g[(3 + k) * c.channels + i], g2 = g[(6 + k) * c.channels + i];
        rows[0][k] = 2 * g0, rows[1][k] = g0 + g1 + g2, rows[2][k] = g0 - g1 + g2, rows[3][k] = 2 * g2;
      }
      for (int r = 0; r < 4; ++r) {
        int u[T::kInputs];
        T::weights(rows[r], u);
        for (int j = 0; j < T::kInputs; ++j) {
          const int place = T::kInputs * r + j;
          const int8_t w = static_cast<int8_t>(u[j]);
          V::put_weight(to + place * p.place + i / V::kUnit * V::kLanes * V::kUnit + i % V::kUnit, 0, w);
          sum[place] += V::start(w, winograd_offset<V, T>(place));
        }
      }
    }
    for (int place = 0; place < kPlaces; ++place)
      p.start[(vector * kPlaces + place) * V::kLanes + lane] = static_cast<int32_t>(sum[place]);
    p.m[o] = c.m[o];
    p.b[o] = c.b[o];
  }
}

// Four padded rows of codes, the same after B from the left, the codes of `tiles` tiles after B from both sides,
// [tiles / kPixels][places][kPixels][channels] with kColumnCodes after each place, since places a power of two apart would share
// one set of the cache, and the sums of a block of tiles and outputs, [places][kPixels][vectors][lanes].
template <class V, class T>
struct WinogradScratch {
  static constexpr int kPlaces = T::kPlaces;
  using Code = typename V::Code;
  size_t row, channels, place, tiles, bytes;
  uint8_t* rows;
  Code *halves, *codes;
  int32_t* sums;

  WinogradScratch(const Conv& c, void* scratch) {
    row = (round_up(c.out_width, T::kColumns) + 2) * c.channels;
    channels = round_up(c.channels, V::kUnit);
    place = V::kPixels * channels + kColumnCodes;
    const size_t fit = kWinogradBytes / (kPlaces * place * sizeof(Code)), most = kMostTiles / V::kPixels;
    const size_t blocks = fit < 1 ? 1 : fit < most ? fit : most;
    tiles = blocks * V::kPixels;
    char* at = static_cast<char*>(scratch);
    const auto take = [&](size_t size) {
      char* found = at;
      at += round_up(size, 64);
      return found;
    };
    sums = reinterpret_cast<int32_t*>(take(kPlaces * V::kPixels * V::kVectors * V::kLanes * sizeof(int32_t)));
    codes = reinterpret_cast<Code*>(take(blocks * kPlaces * place * sizeof(Code)));
    halves = reinterpret_cast<Code*>(take((4 * row + kColumnCodes) * sizeof(Code)));
    rows = reinterpret_cast<uint8_t*>(take(4 * row));
    bytes = static_cast<size_t>(at - static_cast<char*>(scratch));
  }
  Code* tile(size_t t) const { return codes + t / V::kPixels * kPlaces * place + t % V::kPixels * channels; }
};

// Row y of the padded image, y may lie outside.
inline void padded_row(const Conv& c, const uint8_t* image, int y, size_t codes, uint8_t* to) {
  const size_t channels = c.channels, left = c.pad_w * channels, inside = c.width * channels;
  const bool outside = y < 0 || y >= c.height;
  for (size_t at = 0; at < codes;) {
    if (at == left && !outside) {
      memcpy(to + at, image + static_cast<size_t>(y) * inside, inside);
      at += inside;
      continue;
    }
    for (size_t i = 0; i < channels; ++i) to[at + i] = static_cast<uint8_t>(c.pad_value[i]);
    at += channels;
  }
}

// B from the left on four rows of codes.
template <class Code>
void transform_rows(const uint8_t* __restrict d0, const uint8_t* __restrict d1, const uint8_t* __restrict d2,
                    const uint8_t* __restrict d3, size_t count, Code* __restrict to) {
  Code *__restrict t0 = to, *__restrict t1 = to + count, *__restrict t2 = t1 + count, *__restrict t3 = t2 + count;
  for (size_t i = 0; i < count; ++i) {
    t0[i] = static_cast<Code>(d0[i] - d2[i]);
    t1[i] = static_cast<Code>(d1[i] + d2[i]);
    t2[i] = static_cast<Code>(d2[i] - d1[i]);
    t3[i] = static_cast<Code>(d1[i] - d3[i]);
  }
}

// Where the outputs of a tile go: the first one's element, and how many rows and columns exist.
struct WinogradTile {
  size_t at;
  int rows, columns;
};

// kPixels tiles x some vectors of outputs: products, sums over the channels, A on both sides, epilogue.
template <class V, class T, class Finish>
void winograd_block(const Conv& c, const WinogradPacking<V, T>& p, const WinogradScratch<V, T>& s, size_t block, size_t count,
                    size_t vector, int vectors, const WinogradTile* tiles, const typename V::Scale& scale, const Finish& write) {
  using I32 = typename V::I32;
  constexpr size_t kLanes = V::kLanes, kPlaces = T::kPlaces;
  const size_t place_step = V::kPixels * vectors * kLanes;
  const auto run = vectors == 1 ? tile_sums<V, 1> : vectors == 2 ? tile_sums<V, 2> : tile_sums<V, V::kVectors>;
  const typename V::Code* x = s.tile(block);
  const typename V::Weight* weight = p.weight + vector * kPlaces * p.place;
  const int32_t* start = p.start + vector * kPlaces * kLanes;
  for (size_t place = 0; place < kPlaces; ++place) {
    const typename V::Code* tile[8];
    for (int i = 0; i < 8; ++i) tile[i] = x + place * s.place + i % V::kPixels * s.channels;
    run(tile, 0, 1, s.channels / V::kUnit, weight + place * p.place, kPlaces * p.place, start + place * kLanes, kPlaces * kLanes,
        s.sums + place * place_step);
  }
  for (int n = 0; n < vectors; ++n) {
    const int o = static_cast<int>(vector + n) * V::kLanes;
    const Requantize<V, Finish> requantize(write, o, p.m + o, p.b + o);
    const auto all = [&](int lanes) {
      for (size_t i = 0; i < count; ++i) {
        const int32_t* from = s.sums + (i * vectors + n) * kLanes;
        I32 half[2][T::kInputs];
        for (int j = 0; j < T::kInputs; ++j) {
          const auto at = [&](int row) { return V::load(from + (T::kInputs * row + j) * place_step); };
          const I32 one = at(1), two = at(2);
          half[0][j] = V::add(at(0), V::add(one, two));
          half[1][j] = V::sub(V::sub(one, two), at(3));
        }
        const WinogradTile tile = tiles[i];
        const auto row = [&](const I32* h, size_t to) {
          I32 y[T::kColumns];
          T::template outputs<V>(h, y);
          write(to, o, lanes, requantize(y[0], scale));
          if (tile.columns == T::kColumns)
            for (int k = 1; k < T::kColumns; ++k) write(to += c.outputs, o, lanes, requantize(y[k], scale));
          else
            for (int k = 1; k < tile.columns; ++k) write(to += c.outputs, o, lanes, requantize(y[k], scale));
        };
        row(half[0], tile.at + o);
        if (tile.rows > 1) row(half[1], tile.at + o + static_cast<size_t>(c.out_width) * c.outputs);
      }
    };
    if (c.outputs - o >= V::kLanes) all(V::kLanes);  // a number that the compiler knows
    else all(c.outputs - o);
  }
}

template <class V, class T, class Finish>
void winograd_rows(const Conv& c, const WinogradPacking<V, T>& p, const uint8_t* image, int row0, int row1, const Finish& write,
                   void* scratch) {
  const WinogradScratch<V, T> s(c, scratch);
  const typename V::Scale scale(c.shift);
  const int rows = row1 - row0, top = row0 - c.pad_h;
  // Whole vectors: what is too much belongs to the next tile, which comes later, or lies in the bytes after a place.
  const size_t channels = round_up(c.channels, kColumnCodes);
  const size_t tiles_x = (static_cast<size_t>(c.out_width) + T::kColumns - 1) / T::kColumns, all = tiles_x * ((rows + 1) / 2);
  WinogradTile tiles[kMostTiles];
  int begun = -1, padded = 0;  // the row of tiles whose halves are there, rows of the image that are
  for (size_t first = 0; first < all; first += s.tiles) {
    const size_t count = all - first < s.tiles ? all - first : s.tiles;
    for (size_t t = 0; t < count; ++t) {
      const int ty = static_cast<int>((first + t) / tiles_x), x = static_cast<int>((first + t) % tiles_x) * T::kColumns;
      if (ty != begun) {
        begun = ty;
        for (; padded < 2 * ty + 4; ++padded) padded_row(c, image, top + padded, s.row, s.rows + padded % 4 * s.row);
        const auto row = [&](int i) { return s.rows + (2 * ty + i) % 4 * s.row; };
        transform_rows(row(0), row(1), row(2), row(3), s.row, s.halves);
      }
      tiles[t] = {(2 * static_cast<size_t>(ty) * c.out_width + x) * c.outputs, at_most(2, rows - 2 * ty),
                  at_most(T::kColumns, c.out_width - x)};
      typename V::Code* const to = s.tile(t);
      for (int i = 0; i < 4; ++i)
        T::columns(s.halves + i * s.row + static_cast<size_t>(x) * c.channels, c.channels, channels, winograd_offset<V, T>(T::kInputs * i),
                   winograd_offset<V, T>(T::kInputs * i + 1), to + T::kInputs * i * s.place, s.place);
    }
    for (size_t vector = 0; vector < p.vectors;) {
      const size_t left = p.vectors - vector;
      const int n = left == 4 ? 2 : left < V::kVectors ? static_cast<int>(left) : V::kVectors;  // 4 are better split 2 + 2 than 3 + 1
      for (size_t block = 0; block < count; block += V::kPixels)
        winograd_block<V, T>(c, p, s, block, count - block < V::kPixels ? count - block : V::kPixels, vector, n, tiles + block, scale, write);
      vector += n;
    }
  }
}

template <class V, class T>
void conv_winograd(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
  const WinogradPacking<V, T> p(c, packed);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  with_finish<V>(e, c.outputs, *p.fits,
                 [&](const auto& write) { winograd_rows<V, T>(c, p, codes, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

template <class V, class T>
constexpr ConvKernel winograd_tiles() {
  return {nullptr, [](const Conv& c) { return WinogradPacking<V, T>(c, nullptr).bytes; }, winograd_pack<V, T>,
          [](const Conv& c, int) { return WinogradScratch<V, T>(c, nullptr).bytes; }, conv_winograd<V, T>};
}

template <class V>
ConvKernel winograd_way(const Conv& c) {
  return c.wide_tiles ? winograd_tiles<V, WideTile>() : winograd_tiles<V, SquareTile>();
}

template <class V>
constexpr ConvKernel winograd_kernel() {
  return {[](const Conv& c) { return may_support(Variant::winograd, c); }, [](const Conv& c) { return winograd_way<V>(c).packed_bytes(c); },
          [](const Conv& c, void* packed) { winograd_way<V>(c).pack(c, packed); },
          [](const Conv& c, int rows) { return winograd_way<V>(c).scratch_bytes(c, rows); },
          [](const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
            winograd_way<V>(c).run(c, packed, image, row0, row1, e, scratch);
          }};
}

}  // namespace
}  // namespace bitspike
