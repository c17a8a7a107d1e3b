// Whole numbers of 64 outputs of a pixel, or of 32, or of the first `count` of them, become bytes between two numbers: four vectors become one.
#pragma once
#include <immintrin.h>

#include "finish.h"

namespace bitspike {
namespace {

struct Bytes {
  __m512i lo, hi;
  uint64_t there;
  bool is_signed;
  Bytes(int least, int most, int count = 64)
      : lo(_mm512_set1_epi8(static_cast<char>(least))), hi(_mm512_set1_epi8(static_cast<char>(most))),
        there(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1), is_signed(least < 0) {}

  BITSPIKE_INLINE __m512i join(const __m512i (&v)[4]) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
    const __m512i bytes = is_signed ? _mm512_max_epi8(_mm512_min_epi8(_mm512_packs_epi16(low, high), hi), lo)
                                    : _mm512_max_epu8(_mm512_min_epu8(_mm512_packus_epi16(low, high), hi), lo);
    return _mm512_permutexvar_epi32(order, bytes);
  }
  // The first `outputs` of 64.
  BITSPIKE_INLINE void store(const __m512i (&v)[4], uint8_t* to, int outputs) const {
    if (outputs >= 64) _mm512_storeu_si512(to, join(v));
    else _mm512_mask_storeu_epi8(to, (uint64_t{1} << outputs) - 1, join(v));
  }
  static constexpr size_t kUncounted = ~size_t{0};
  // Those that are there, and how many are not 0, unless that is kUncounted.
  BITSPIKE_INLINE void put(const __m512i (&v)[4], uint8_t* to, size_t& nonzero) const {
    const __m512i codes = join(v);
    if (nonzero != kUncounted) nonzero += static_cast<size_t>(_mm_popcnt_u64(_mm512_mask_test_epi8_mask(there, codes, codes)));
    _mm512_mask_storeu_epi8(to, there, codes);
  }
  BITSPIKE_INLINE void put(const __m512i (&v)[2], uint8_t* to, size_t& nonzero) const {
    const __m512i words = _mm512_packs_epi32(v[0], v[1]);
    const __m256i low = _mm512_castsi512_si256(words), high = _mm512_extracti64x4_epi64(words, 1);
    const __m256i least = _mm512_castsi512_si256(lo), most = _mm512_castsi512_si256(hi);
    const __m256i bytes = is_signed ? _mm256_max_epi8(_mm256_min_epi8(_mm256_packs_epi16(low, high), most), least)
                                    : _mm256_max_epu8(_mm256_min_epu8(_mm256_packus_epi16(low, high), most), least);
    const __m256i codes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    const __mmask32 some = static_cast<__mmask32>(there);
    if (nonzero != kUncounted) nonzero += static_cast<size_t>(_mm_popcnt_u32(_mm256_mask_test_epi8_mask(some, codes, codes)));
    _mm256_mask_storeu_epi8(reinterpret_cast<__m256i*>(to), some, codes);
  }
};

}  // namespace
}  // namespace bitspike
