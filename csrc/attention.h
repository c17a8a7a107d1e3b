// q (k^T v): two products of small matrices of numbers >= 0, by dot products of bytes (u8 x 7 bits) or of int16 (15 bits). What
// does not fit into one right operand is cut into digits of so many bits; two for the k^T v of most spiking networks.
#pragma once
#include "tiles.h"

namespace bitspike {
namespace {

// How an instruction set multiplies codes: a word is kUnit neighbouring numbers along what is summed over.
template <class V>
struct CodeProducts {
  using I32 = typename V::I32;
  static constexpr bool kBytes = V::kUnit == 4 && V::kUnsignedOffset == 0;  // u8 x s8 as they are
  static constexpr int kUnit = kBytes ? 4 : 2, kFieldBits = 32 / kUnit, kDigitBits = kFieldBits - 1;
  static constexpr int kMostDigits = (31 + kDigitBits - 1) / kDigitBits;

  static I32 dot(I32 acc, I32 left, I32 right) {
    if constexpr (kBytes) return V::dot(acc, left, right);
    else return V::dot16(acc, left, right);
  }
  static int digits(uint32_t most) {
    int count = 1;
    while (most >>= kDigitBits) ++count;
    return count;
  }
  static I32 digit(I32 v, int i) {
    const int above = 32 - kDigitBits * (i + 1);
    return above >= 0 ? V::shift_right_zero(V::shift_left(v, above), 32 - kDigitBits) : V::shift_right_zero(v, kDigitBits * i);
  }
  static I32 put(I32 word, I32 v, int place) { return V::or_(word, V::shift_left(v, kFieldBits * place)); }
};

// The bits that occur in any lane.
template <class V>
uint32_t bits_of(typename V::I32 v) {
  int32_t lanes[V::kLanes];
  V::store(lanes, v, V::kLanes);
  uint32_t bits = 0;
  for (int i = 0; i < V::kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i]);
  return bits;
}

// Scratch, in int32; `width`: head_channels in whole vectors.
template <class V>
struct AttentionScratch {
  using P = CodeProducts<V>;
  size_t width, pairs, groups;          // words along the tokens and along the channels of a head
  size_t keys, values, kv, right, all;  // where each begins

  explicit AttentionScratch(const Attention& a) {
    const size_t d = a.head_channels;
    width = round_up(d, V::kLanes);
    pairs = (static_cast<size_t>(a.tokens) + P::kUnit - 1) / P::kUnit;
    groups = (d + P::kUnit - 1) / P::kUnit;
    keys = round_up(a.tokens * groups, V::kLanes);  // q as words comes first
    values = keys + pairs * width;
    kv = values + P::digits(255) * pairs * width;
    right = kv + groups * P::kUnit * width;
    all = right + P::kMostDigits * groups * width;
  }
};

template <class V>
size_t attention_scratch_bytes(const Attention& a) {
  return sizeof(int32_t) * AttentionScratch<V>(a).all;
}

// Words left[r * row + g * step] times digits right[digit][g][width]: kRows rows from `first` on, N vectors from `at` on.
template <class V, int kRows, int N, class Write>
void product_block(const int32_t* left, size_t row, size_t step, size_t first, size_t rows, const int32_t* right, int digits,
                   size_t groups, size_t width, size_t at, const Write& write) {
  using P = CodeProducts<V>;
  typename V::I32 acc[kRows][N];
  const int32_t* from[kRows];  // the last row is repeated to fill the block
  for (int r = 0; r < kRows; ++r) {
    from[r] = left + (first + (first + r < rows ? r : rows - 1 - first)) * row;
    for (int n = 0; n < N; ++n) acc[r][n] = V::zero();
  }
  // From the highest digit on. Sums are modulo 2^32, and the true one is below 2^31.
  for (int digit = digits - 1; digit >= 0; --digit) {
    const int32_t* words = right + digit * groups * width + at;
    for (size_t g = 0; g < groups; ++g, words += width) {
      typename V::I32 w[N];
      for (int n = 0; n < N; ++n) w[n] = V::load(words + n * V::kLanes);
      for (int r = 0; r < kRows; ++r) {
        const typename V::I32 code = V::splat(from[r][g * step]);
        for (int n = 0; n < N; ++n) acc[r][n] = P::dot(acc[r][n], code, w[n]);
      }
    }
    if (digit)
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = V::shift_left(acc[r][n], P::kDigitBits);
  }
  for (int r = 0; r < kRows; ++r)
    if (first + r < rows)
      for (int n = 0; n < N; ++n) write(first + r, at + n * V::kLanes, acc[r][n]);
}

template <class V, class Write>
void product(const int32_t* left, size_t row, size_t step, size_t rows, const int32_t* right, int digits, size_t groups,
             size_t width, const Write& write) {
  constexpr int kRows = V::kPixels;
  for (size_t at = 0; at < width;) {
    const size_t vectors = (width - at) / V::kLanes;
    const int n = vectors == 4 ? 2 : vectors < V::kVectors ? static_cast<int>(vectors) : V::kVectors;
    for (size_t first = 0; first < rows; first += kRows) {
      if (V::kVectors == 3 && n == 3)
        product_block<V, kRows, V::kVectors>(left, row, step, first, rows, right, digits, groups, width, at, write);
      else if (n == 2)
        product_block<V, kRows, 2>(left, row, step, first, rows, right, digits, groups, width, at, write);
      else
        product_block<V, kRows, 1>(left, row, step, first, rows, right, digits, groups, width, at, write);
    }
    at += n * V::kLanes;
  }
}

// q as words along its channels: to[token][groups].
template <class V>
void attention_queries(const Attention& a, const uint8_t* q, size_t groups, int32_t* to) {
  const size_t d = a.head_channels, step = a.channels;
  for (size_t n = 0; n < static_cast<size_t>(a.tokens); ++n, to += groups) {
    const uint8_t* from = q + n * step;
    if constexpr (CodeProducts<V>::kBytes) {
      for (size_t g = 0; g < groups; g += V::kLanes) {
        const size_t left = groups - g < V::kLanes ? groups - g : V::kLanes, codes = d - 4 * g;
        V::store(to + g, V::load_codes(from + 4 * g, codes < V::kBytes ? static_cast<int>(codes) : V::kBytes), static_cast<int>(left));
      }
    } else {
      for (size_t g = 0; g < d / 2; ++g) to[g] = from[2 * g] | from[2 * g + 1] << 16;
      if (d % 2) to[groups - 1] = from[d - 1];
    }
  }
}

template <class V>
void attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch) {
  using I32 = typename V::I32;
  using P = CodeProducts<V>;
  const AttentionScratch<V> s(a);
  const size_t d = a.head_channels, step = a.channels, tokens = a.tokens, width = s.width;
  int32_t* const base = static_cast<int32_t*>(scratch);
  int32_t *queries = base, *keys = base + s.keys, *values = base + s.values, *kv = base + s.kv, *right = base + s.right;
  attention_queries<V>(a, q, s.groups, queries);

  // k and v as words along the tokens: [pairs][width].
  I32 any = V::zero();
  for (size_t p = 0; p < s.pairs; ++p)
    for (size_t j = 0; j < d; j += V::kLanes) {
      const int lanes = d - j < V::kLanes ? static_cast<int>(d - j) : V::kLanes;
      I32 key = V::zero(), low = V::zero(), high = V::zero();
      for (int u = 0; u < P::kUnit; ++u) {
        const size_t n = p * P::kUnit + u;
        if (n >= tokens) break;
        key = P::put(key, V::widen_u8(k + n * step + j, lanes), u);
        const I32 code = V::widen_u8(v + n * step + j, lanes);
        any = V::or_(any, code);
        low = P::put(low, P::digit(code, 0), u);
        if (P::digits(255) > 1) high = P::put(high, P::digit(code, 1), u);
      }
      V::store(keys + p * width + j, key, V::kLanes);
      V::store(values + p * width + j, low, V::kLanes);
      if (P::digits(255) > 1) V::store(values + (s.pairs + p) * width + j, high, V::kLanes);
    }
  const int value_digits = P::digits(bits_of<V>(any));
  any = V::zero();
  product<V>(keys, 1, width, d, values, value_digits, s.pairs, width, [&](size_t i, size_t j, I32 sum) {
    any = V::or_(any, sum);
    V::store(kv + i * width + j, sum, V::kLanes);
  });
  memset(kv + d * width, 0, (s.groups * P::kUnit - d) * width * sizeof(int32_t));

  // k^T v as words of digits along its rows.
  const uint32_t most = bits_of<V>(any);
  const int digits = P::digits(most);
  for (int i = 0; i < digits; ++i)
    for (size_t g = 0; g < s.groups; ++g)
      for (size_t j = 0; j < width; j += V::kLanes) {
        I32 word = V::zero();
        for (int u = 0; u < P::kUnit; ++u)
          word = P::put(word, P::digit(V::load(kv + (g * P::kUnit + u) * width + j), i), u);
        V::store(right + (i * s.groups + g) * width + j, word, V::kLanes);
      }
  const typename V::Scale scale(a.shift);
  const typename V::Factor m(int64_t{a.m}), zero(int64_t{0});
  product<V>(queries, s.groups, 1, tokens, right, digits, s.groups, width, [&](size_t n, size_t j, I32 sum) {
    V::store(y + n * step + j, V::requant(sum, m, zero, scale), d - j < V::kLanes ? static_cast<int>(d - j) : V::kLanes);
  });
}

}  // namespace
}  // namespace bitspike
