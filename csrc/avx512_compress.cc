// Lists of events with VBMI2, which compresses bytes: 64 codes at a time.
#include <immintrin.h>

#include "kernels.h"

namespace bitspike {

namespace {

// What it gives to `body`: load(c), 64 codes from channel c on, and put(c, has), which appends those of them that `has` names.
template <class Body>
size_t append(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base, Body body) {
  alignas(64) static constexpr uint8_t kNumbers[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
      32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  constexpr int kEntryBits = 3;
  static_assert(kEventEntry == 1 << kEntryBits, "a factor that is a shift");
  const __m512i numbers = _mm512_load_si512(kNumbers);
  const auto load = [=](int c) {
    return channels - c >= 64 ? _mm512_loadu_si512(codes + c)
                              : _mm512_maskz_loadu_epi8((uint64_t{1} << (channels - c)) - 1, codes + c);
  };
  const auto put = [&](int c, uint64_t has) {
    const __m512i first = _mm512_set1_epi16(static_cast<short>(c * kEventEntry + base));
    const __m512i some = _mm512_maskz_compress_epi8(has, numbers);
    const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(some));
    _mm512_storeu_si512(to + count, _mm512_add_epi16(_mm512_slli_epi16(low, kEntryBits), first));
    const int found = static_cast<int>(_mm_popcnt_u64(has));
    if (found > 32) {
      const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(some, 1));
      _mm512_storeu_si512(to + count + 32, _mm512_add_epi16(_mm512_slli_epi16(high, kEntryBits), first));
    }
    count += found;
  };
  body(load, put);
  return count;
}

}  // namespace

size_t append_events_avx512(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
  // All channels whose code is not 0, then again all that reach 2, then 3. How far any channel of a pixel reaches is told beforehand
  // more often than how far any of 64 does, and a wrong guess takes longer than a turn in vain.
  return append(to, count, codes, channels, base, [=](const auto& load, const auto& put) {
    __m512i most = _mm512_setzero_si512();
    for (int c = 0; c < channels; c += 64) {
      const __m512i code = load(c);
      most = _mm512_max_epu8(most, code);
      put(c, _mm512_test_epi8_mask(code, code));
    }
    for (int least = 2;; ++least) {
      const __m512i limit = _mm512_set1_epi8(static_cast<char>(least));
      if (!_mm512_cmpge_epu8_mask(most, limit)) return;
      for (int c = 0; c < channels; c += 64) put(c, _mm512_cmpge_epu8_mask(load(c), limit));
    }
  });
}

size_t append_plane_avx512(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base, int plane) {
  const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << plane));
  return append(to, count, codes, channels, base, [=](const auto& load, const auto& put) {
    for (int c = 0; c < channels; c += 64) put(c, _mm512_test_epi8_mask(load(c), bit));
  });
}

}  // namespace bitspike
