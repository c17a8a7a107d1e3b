// Maps of attention by AND and bit counts, over the primitives of tiles.h. Both operands become bits: of every code's plane p,
// word by word along what is summed over. With binary spikes there is one plane each and
//
//   sum of a b = sum over words of popcount(a & b)
//
// and with counts 2^(p + q) times that for each pair of planes. How many planes there are is seen from the codes. All partial
// sums are below the result, of which the reader has proved that it stays below 2^31.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// [plane][head][word][row]; rows padded to whole vectors (what the padding holds is never stored).
struct Bits {
  size_t rows, words, head, plane;
  int planes;
  uint32_t* at;

  Bits(size_t heads, size_t size, size_t row_count, size_t lanes, void* memory)
      : rows(round_up(row_count, lanes)), words((size + 31) / 32), head(words * rows), plane(heads * head), planes(0),
        at(static_cast<uint32_t*>(memory)) {}
  size_t bytes(int most_planes) const { return round_up(most_planes * plane * sizeof(uint32_t), 64); }
};

constexpr int kMostPlanes = 8;

template <class V>
int planes_of(const uint8_t* codes, size_t count) {
  uint8_t any = 0;
  for (size_t i = 0; i < count; ++i) any |= codes[i];
  int planes = 1;
  while (any >> planes) ++planes;
  return planes;
}

// Sums run along a row of `size` codes; row r of head h starts at from + r * row_step + h * head_step.
template <class V>
void rows_to_bits(const uint8_t* from, size_t row_step, size_t head_step, size_t heads, size_t count, size_t size, Bits& to) {
  memset(to.at, 0, to.planes * to.plane * sizeof(uint32_t));
  for (size_t r = 0; r < count; ++r)
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = 0; i < size; i += V::kBytes) {
        const size_t left = size - i;
        const typename V::I32 codes =
            V::load_codes(from + r * row_step + h * head_step + i, left < V::kBytes ? static_cast<int>(left) : V::kBytes);
        uint32_t* word = to.at + h * to.head + i / 32 * to.rows + r;
        for (int p = 0; p < to.planes; ++p, word += to.plane) {
          const uint64_t bits = V::plane(codes, p);
          word[0] |= static_cast<uint32_t>(bits << i % 32);  // i is a multiple of 32, or of 16 where a plane has 16 bits
          if (V::kBytes > 32 && left > 32) word[to.rows] = static_cast<uint32_t>(bits >> 32);
        }
      }
}

// Sums run down a column, over `tokens` that are heads * width codes apart; a row of `to` is a channel of a head.
template <class V>
void columns_to_bits(const uint8_t* from, size_t heads, size_t width, size_t tokens, Bits& to) {
  using I32 = typename V::I32;
  const size_t step = heads * width;
  const I32 one = V::splat(1);
  for (int p = 0; p < to.planes; ++p)
    for (size_t h = 0; h < heads; ++h)
      for (size_t w = 0; w < to.words; ++w)
        for (size_t c = 0; c < width; c += V::kLanes) {
          const int lanes = width - c < V::kLanes ? static_cast<int>(width - c) : V::kLanes;
          const size_t last = tokens < 32 * (w + 1) ? tokens : 32 * (w + 1);
          I32 bits = V::zero();
          for (size_t n = last; n-- > 32 * w;) {  // the last token ends at the highest bit
            const I32 codes = V::widen_u8(from + n * step + h * width + c, lanes);
            bits = V::or_(V::add(bits, bits), V::and_(p ? V::shift_right_zero(codes, p) : codes, one));
          }
          V::store(reinterpret_cast<int32_t*>(to.at + p * to.plane + h * to.head + w * to.rows + c), bits, V::kLanes);
        }
}

constexpr size_t kMapRows = 4, kMapVectors = 2;

// y[(r * heads + h) * side + i] = sat32(rshift(m[h] * sum over k of left[h, r, k] right[h, i, k], shift)).
template <class V>
void products_of_bits(const Bits& left, const Bits& right, size_t heads, size_t rows, size_t side, const int32_t* m,
                      bool m_by_head, int shift, int32_t* y) {
  using I32 = typename V::I32;
  const typename V::Scale scale(shift);
  for (size_t h = 0; h < heads; ++h) {
    const typename V::Factor factor(int64_t{m[m_by_head ? h : 0]});
    for (size_t first = 0; first < rows; first += kMapRows) {
      const size_t count = rows - first < kMapRows ? rows - first : kMapRows;
      for (size_t i = 0; i < side; i += kMapVectors * V::kLanes) {
        I32 acc[kMapRows][kMapVectors];
        for (size_t r = 0; r < kMapRows; ++r)
          for (size_t n = 0; n < kMapVectors; ++n) acc[r][n] = V::zero();
        // Rows and vectors that do not exist repeat others; what they make is not stored.
        const size_t second = i + V::kLanes < right.rows ? V::kLanes : 0;
        for (int p = 0; p < left.planes; ++p)
          for (int q = 0; q < right.planes; ++q) {
            I32 part[kMapRows][kMapVectors];
            for (size_t r = 0; r < kMapRows; ++r)
              for (size_t n = 0; n < kMapVectors; ++n) part[r][n] = V::zero();
            const uint32_t* a = left.at + p * left.plane + h * left.head + first;
            const uint32_t* b = right.at + q * right.plane + h * right.head + i;
            for (size_t w = 0; w < left.words; ++w, a += left.rows, b += right.rows) {
              const I32 columns[kMapVectors] = {V::load(reinterpret_cast<const int32_t*>(b)),
                                                V::load(reinterpret_cast<const int32_t*>(b + second))};
              for (size_t r = 0; r < kMapRows; ++r) {
                const I32 row = V::broadcast32(reinterpret_cast<const uint8_t*>(a + (r < count ? r : count - 1)));
                for (size_t n = 0; n < kMapVectors; ++n) part[r][n] = V::count_and(part[r][n], row, columns[n]);
              }
            }
            for (size_t r = 0; r < kMapRows; ++r)
              for (size_t n = 0; n < kMapVectors; ++n) acc[r][n] = V::add(acc[r][n], V::shift_left(part[r][n], p + q));
          }
        for (size_t r = 0; r < count; ++r)
          for (size_t n = 0; n < kMapVectors; ++n) {
            const size_t at = i + n * V::kLanes;
            if (at >= side) break;
            const int lanes = side - at < V::kLanes ? static_cast<int>(side - at) : V::kLanes;
            V::store(y + ((first + r) * heads + h) * side + at, V::requant(acc[r][n], factor, V::no_bias(), scale), lanes);
          }
      }
    }
  }
}

// Both operands' bits, one behind the other.
template <class V>
struct MapBits {
  Bits left, right;
  MapBits(const Heads& s, size_t size, size_t rows, size_t side, void* scratch)
      : left(s.heads, size, rows, V::kLanes, scratch),
        right(s.heads, size, side, V::kLanes, static_cast<char*>(scratch) + left.bytes(kMostPlanes)) {}
};

template <class V>
size_t attention_map_scratch_bytes(const Heads& s, bool over_channels, size_t rows) {
  const MapBits<V> bits(s, over_channels ? s.width : s.tokens, over_channels ? rows : s.width,
                        over_channels ? s.tokens : s.width, nullptr);
  return bits.left.bytes(kMostPlanes) + bits.right.bytes(kMostPlanes);
}

template <class V>
void attention_map(const Heads& s, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1,
                   int32_t m, int shift, int32_t* y, void* scratch) {
  const size_t step = s.heads * s.width, rows = row1 - row0, side = over_channels ? s.tokens : s.width;
  MapBits<V> bits(s, over_channels ? s.width : s.tokens, over_channels ? rows : s.width, side, scratch);
  const uint8_t* first = over_channels ? a + row0 * step : a;
  bits.left.planes = planes_of<V>(first, (over_channels ? rows : s.tokens) * step);
  bits.right.planes = planes_of<V>(b, s.tokens * step);
  Bits left = bits.left;
  if (over_channels) {
    rows_to_bits<V>(first, step, s.width, s.heads, rows, s.width, bits.left);
    rows_to_bits<V>(b, step, s.width, s.heads, s.tokens, s.width, bits.right);
  } else {
    columns_to_bits<V>(a, s.heads, s.width, s.tokens, bits.left);
    columns_to_bits<V>(b, s.heads, s.width, s.tokens, bits.right);
    left.at += row0;
  }
  products_of_bits<V>(left, bits.right, s.heads, rows, side, &m, false, shift, y);
}

template <class V>
size_t attention_read_scratch_bytes(const Heads& s, bool over_tokens, size_t count) {
  const MapBits<V> bits(s, over_tokens ? s.tokens : s.width, count, s.width, nullptr);
  return bits.left.bytes(kMostPlanes) + bits.right.bytes(kMostPlanes);
}

template <class V>
void attention_read(const Heads& s, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first, size_t count,
                    const int32_t* m, int shift, int32_t* y, void* scratch) {
  const size_t step = s.heads * s.width, side = over_tokens ? s.tokens : s.width, row = s.heads * side;
  MapBits<V> bits(s, side, count, s.width, scratch);
  if (over_tokens) {
    bits.left.planes = planes_of<V>(chosen + first * row, count * row);
    bits.right.planes = planes_of<V>(x, s.tokens * step);
    rows_to_bits<V>(chosen + first * row, row, side, s.heads, count, side, bits.left);
    columns_to_bits<V>(x, s.heads, s.width, s.tokens, bits.right);
  } else {
    bits.left.planes = planes_of<V>(x + first * step, count * step);
    bits.right.planes = planes_of<V>(chosen, s.width * row);
    rows_to_bits<V>(x + first * step, step, s.width, s.heads, count, side, bits.left);
    rows_to_bits<V>(chosen, row, side, s.heads, s.width, side, bits.right);
  }
  products_of_bits<V>(bits.left, bits.right, s.heads, count, s.width, m, true, shift, y);
}

// The ways to compute maps, as one table.
template <class V>
constexpr MapKernel map_kernel() {
  return {attention_map_scratch_bytes<V>, attention_map<V>, attention_read_scratch_bytes<V>, attention_read<V>};
}

}  // namespace
}  // namespace bitspike
