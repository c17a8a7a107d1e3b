#include "spiking.h"

#include <algorithm>

#include "integers.h"

namespace bitspike {
namespace {

void scale(const int32_t* acc, size_t n, int32_t m, int shift, int32_t* y) {
  for (size_t i = 0; i < n; ++i) y[i] = sat32(rshift(int64_t{acc[i]} * m, shift));
}

}  // namespace

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
