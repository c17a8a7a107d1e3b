#include "spiking.h"

#include <algorithm>
#include <vector>

namespace bitspike {
namespace {

int64_t rshift(int64_t x, int s) { return s > 0 ? (x + (int64_t{1} << (s - 1))) >> s : x; }
int32_t sat32(int64_t x) { return static_cast<int32_t>(std::clamp<int64_t>(x, INT32_MIN, INT32_MAX)); }

int32_t dot(const uint8_t* a, const uint8_t* b, size_t n) {
  int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += static_cast<int16_t>(a[i]) * static_cast<int16_t>(b[i]);
  return sum;
}

void add_scaled(int32_t* acc, const uint8_t* row, int32_t factor, size_t n) {
  if (factor == 1) {
    for (size_t i = 0; i < n; ++i) acc[i] += row[i];
  } else {
    for (size_t i = 0; i < n; ++i) acc[i] += factor * row[i];
  }
}

void scale(const int32_t* acc, size_t n, int32_t m, int shift, int32_t* y) {
  for (size_t i = 0; i < n; ++i) y[i] = sat32(rshift(int64_t{acc[i]} * m, shift));
}

}  // namespace

void attention_map(const Heads& s, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1,
                   int32_t m, int shift, int32_t* y) {
  const size_t step = s.heads * s.width, side = over_channels ? s.tokens : s.width;
  std::vector<int32_t> acc(side);
  for (size_t row = row0; row < row1; ++row)
    for (size_t h = 0; h < s.heads; ++h, y += side) {
      if (over_channels) {
        for (size_t l = 0; l < side; ++l) acc[l] = dot(a + row * step + h * s.width, b + l * step + h * s.width, s.width);
      } else {
        std::fill(acc.begin(), acc.end(), 0);
        for (size_t n = 0; n < s.tokens; ++n) {
          const int32_t factor = a[n * step + h * s.width + row];
          if (factor) add_scaled(acc.data(), b + n * step + h * s.width, factor, side);
        }
      }
      scale(acc.data(), side, m, shift, y);
    }
}

void attention_read(const Heads& s, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first, size_t count,
                    const int32_t* m, int shift, int32_t* y) {
  const size_t step = s.heads * s.width, side = over_tokens ? s.tokens : s.width;
  std::vector<int32_t> acc(s.width);
  for (size_t n = first; n < first + count; ++n)
    for (size_t h = 0; h < s.heads; ++h, y += s.width) {
      if (over_tokens) {
        const uint8_t* row = chosen + (n * s.heads + h) * side;
        std::fill(acc.begin(), acc.end(), 0);
        for (size_t l = 0; l < side; ++l)
          if (row[l]) add_scaled(acc.data(), x + l * step + h * s.width, row[l], s.width);
      } else {
        for (size_t j = 0; j < s.width; ++j) acc[j] = dot(chosen + (j * s.heads + h) * side, x + n * step + h * s.width, side);
      }
      scale(acc.data(), s.width, m[h], shift, y);
    }
}

void coincidences(const uint8_t* k, const uint8_t* v, size_t positions, size_t channels, int32_t m, int shift, int32_t* y) {
  std::fill(y, y + channels, 0);
  for (size_t p = 0; p < positions; ++p, k += channels, v += channels)
    for (size_t c = 0; c < channels; ++c) y[c] += static_cast<int16_t>(k[c]) * static_cast<int16_t>(v[c]);
  scale(y, channels, m, shift, y);
}

void add_codes(const uint8_t* a, const uint8_t* b, size_t count, uint8_t* y) {
  for (size_t i = 0; i < count; ++i) y[i] = static_cast<uint8_t>(a[i] + b[i]);
}

void mask_codes(const uint8_t* q, const uint8_t* chosen, size_t positions, size_t channels, uint8_t* y) {
  for (size_t p = 0; p < positions; ++p, q += channels, y += channels)
    for (size_t c = 0; c < channels; ++c) y[c] = static_cast<uint8_t>(q[c] * chosen[c]);
}

}  // namespace bitspike
