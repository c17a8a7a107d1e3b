#include "codes.h"

#include <algorithm>
#include <cstring>

namespace bitspike {
namespace {

// 8 / bits codes at a time, through a table of what every byte becomes.
template <int kBits>
void unpack_bytes(const uint8_t* packed, size_t count, const int8_t* table, int8_t* codes) {
  constexpr size_t kEach = 8 / kBits;
  int8_t whole[256][kEach];
  for (int byte = 0; byte < 256; ++byte)
    for (size_t i = 0; i < kEach; ++i) whole[byte][i] = table[(byte >> (i * kBits)) & ((1 << kBits) - 1)];
  const size_t full = count / kEach;
  for (size_t i = 0; i < full; ++i) std::memcpy(codes + i * kEach, whole[packed[i]], kEach);
  for (size_t i = full * kEach; i < count; ++i) codes[i] = whole[packed[full]][i % kEach];
}

int64_t sum_of_sizes(const int8_t* w, size_t n) {
  int64_t sum = 0;
  while (n) {
    const size_t block = std::min<size_t>(n, 1 << 20);
    int32_t part = 0;
    for (size_t i = 0; i < block; ++i) part += w[i] < 0 ? -w[i] : w[i];
    sum += part;
    w += block, n -= block;
  }
  return sum;
}

}  // namespace

void unpack_codes(const uint8_t* packed, size_t count, int bits, const int8_t* table, int8_t* codes) {
  if (bits == 1) return unpack_bytes<1>(packed, count, table, codes);
  if (bits == 2) return unpack_bytes<2>(packed, count, table, codes);
  if (bits == 4) return unpack_bytes<4>(packed, count, table, codes);
  if (bits == 8) return unpack_bytes<8>(packed, count, table, codes);
  uint32_t ahead = 0;
  int have = 0;
  for (size_t i = 0; i < count; ++i) {
    if (have < bits) {
      ahead |= static_cast<uint32_t>(*packed++) << have;
      have += 8;
    }
    codes[i] = table[ahead & ((1u << bits) - 1)];
    ahead >>= bits;
    have -= bits;
  }
}

int64_t accumulator_bound(const int8_t* weight, size_t outputs, size_t taps, size_t group_channels, size_t groups,
                          const int64_t* largest) {
  const size_t channels = group_channels * groups, each = taps * group_channels;
  const bool uniform = std::all_of(largest, largest + channels, [&](int64_t n) { return n == largest[0]; });
  int64_t worst = 0;
  for (size_t o = 0; o < outputs; ++o) {
    const int8_t* w = weight + o * each;
    int64_t sum = 0;
    if (uniform) {
      sum = sum_of_sizes(w, each) * largest[0];
    } else {
      const int64_t* of = largest + o / (outputs / groups) * group_channels;
      for (size_t t = 0; t < taps; ++t)
        for (size_t c = 0; c < group_channels; ++c, ++w) sum += (*w < 0 ? -*w : *w) * of[c];
    }
    worst = std::max(worst, sum);
  }
  return worst;
}

}  // namespace bitspike
