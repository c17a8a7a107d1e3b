// Lists of events with VBMI2, which compresses bytes: 64 codes at a time.
#include <immintrin.h>

#include "kernels.h"

namespace bitspike {

size_t append_events_avx512(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
  alignas(64) static constexpr uint8_t kNumbers[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
      32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  constexpr int kEntryBits = 3;
  static_assert(kEventEntry == 1 << kEntryBits, "a factor that is a shift");
  const __m512i numbers = _mm512_load_si512(kNumbers);
  for (int c = 0; c < channels; c += 64) {
    const __m512i code = channels - c >= 64 ? _mm512_loadu_si512(codes + c)
                                            : _mm512_maskz_loadu_epi8((uint64_t{1} << (channels - c)) - 1, codes + c);
    const __m512i first = _mm512_set1_epi16(static_cast<short>(c * kEventEntry + base));
    int least = 1;
    for (uint64_t has = _mm512_test_epi8_mask(code, code); has;
         has = _mm512_cmpge_epu8_mask(code, _mm512_set1_epi8(static_cast<char>(++least)))) {
      const __m512i some = _mm512_maskz_compress_epi8(has, numbers);
      const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(some));
      _mm512_storeu_si512(to + count, _mm512_add_epi16(_mm512_slli_epi16(low, kEntryBits), first));
      const int found = static_cast<int>(_mm_popcnt_u64(has));
      if (found > 32) {
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(some, 1));
        _mm512_storeu_si512(to + count + 32, _mm512_add_epi16(_mm512_slli_epi16(high, kEntryBits), first));
      }
      count += found;
    }
  }
  return count;
}

}  // namespace bitspike
