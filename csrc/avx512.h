// AVX-512 with VNNI. vpdpbusd: 64 products per instruction, u8 x s8 into int32, no saturation; two per cycle on Zen 5,
// one or two on Intel, latency 4 to 5, so 8 or more independent accumulators keep it busy and 24 hide the loads too.
#pragma once
#include <immintrin.h>

#include "avx512_bytes.h"

namespace bitspike {
namespace {

struct Avx512 {
  using I32 = __m512i;
  using F32 = __m512;
  using Code = uint8_t;
  using Weight = int8_t;
  static constexpr int kUnit = 4, kLanes = 16, kPixels = 8, kVectors = 3;
  static constexpr int kBytes = 64, kNibbleVectors = 2, kByteVectors = 1;
  static constexpr int kSignedOffset = 128, kUnsignedOffset = 0;  // vpdpbusd wants unsigned codes; the start value takes it back

  static __mmask16 mask(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }

  static I32 zero() { return _mm512_setzero_si512(); }
  static I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I32 load(const int32_t* p, int lanes) {
    return lanes == kLanes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(mask(lanes), p);
  }
  static constexpr int kFields = 1, kScaleBits = 0;
  static void put_weight(int8_t* at, int, int8_t w) { *at = w; }
  static uint32_t start(int8_t w, int32_t offset) { return 0u - static_cast<uint32_t>(w * offset); }
  static I32 unpack(I32 packed, int) { return packed; }
  static I32 unscale(I32 acc) { return acc; }
  static I32 xor_(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
  static I32 shift_left_each(I32 a, I32 n) { return _mm512_sllv_epi32(a, n); }
  template <int kBits>
  struct Narrow;

  static I32 load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, I32 v, int lanes) {
    if (lanes >= kLanes) _mm512_storeu_si512(p, v);
    else _mm512_mask_storeu_epi32(p, mask(lanes), v);
  }
  static void store_codes(uint8_t* p, I32 v, int lanes) {
    const __m128i codes = _mm512_cvtepi32_epi8(v);
    if (lanes >= kLanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    else _mm_mask_storeu_epi8(p, mask(lanes), codes);
  }

  static I32 broadcast(const uint8_t* p) {
    int32_t unit;
    memcpy(&unit, p, 4);
    return _mm512_set1_epi32(unit);
  }
  static I32 dot(I32 acc, I32 codes, I32 weights) { return _mm512_dpbusd_epi32(acc, codes, weights); }

  static I32 widen_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I32 widen_s8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I32 widen_u8(const uint8_t* p, int lanes) {
    return lanes == kLanes ? widen_u8(p) : _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(lanes), p));
  }
  static I32 widen_s8(const uint8_t* p, int lanes) {
    return lanes == kLanes ? widen_s8(p) : _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask(lanes), p));
  }

  template <bool kSigned>
  static I32 tap_code(const uint8_t* p, int lanes) {
    const I32 code = widen_u8(p, lanes);
    return kSigned ? _mm512_xor_si512(code, _mm512_set1_epi32(0x80)) : code;
  }
  static I32 shift_right_zero(I32 a, int n) { return _mm512_srli_epi32(a, n); }
  static I32 or_(I32 a, I32 b) { return _mm512_or_si512(a, b); }

  // s8 codes + 128 = the sign bit flipped.
  static void convert(uint8_t* to, const uint8_t* from, size_t n, bool is_signed) {
    const uint8_t flip = is_signed ? 0x80 : 0;
    for (size_t i = 0; i < n; ++i) to[i] = from[i] ^ flip;
  }
  // Where the input already is what the kernel wants to read, it is read where it lies.
  static const uint8_t* in_place(const Conv& c, const uint8_t* image, int first_row, int unit) {
    const bool as_is = c.kind == Kind::u8 && c.groups == 1 && !c.pad_h && !c.pad_w && c.channels % unit == 0;
    return as_is ? image + static_cast<size_t>(first_row) * c.width * c.channels : nullptr;
  }

  // A per-channel number as int64: lanes 0, 2, 4 .. and lanes 1, 3, 5 .. (vpmuldq multiplies every other lane).
  struct Factor {
    __m512i even, odd;
    explicit Factor(__m512i v) : even(_mm512_srai_epi64(_mm512_slli_epi64(v, 32), 32)), odd(_mm512_srai_epi64(v, 32)) {}
    explicit Factor(const int32_t* p) : Factor(_mm512_loadu_si512(p)) {}
    Factor(__m512i e, __m512i o) : even(e), odd(o) {}
    explicit Factor(int64_t v) : even(_mm512_set1_epi64(v)), odd(even) {}
  };
  // To multiply by only: vpmuldq does not look at the upper halves.
  static Factor multiplier(const int32_t* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return {v, _mm512_srli_epi64(v, 32)};
  }
  static Factor factor(const int32_t* p, int lanes) { return Factor(load(p, lanes)); }
  static Factor no_bias() { return Factor(zero(), zero()); }

  struct Scale {
    __m512i half;
    __m128i shift;
    explicit Scale(int s)
        : half(_mm512_set1_epi64(s > 0 ? int64_t{1} << (s - 1) : 0)), shift(_mm_cvtsi32_si128(s)) {}
  };

  static __m512i shifted8(__m512i x, __m512i m, const Scale& s) {
    return _mm512_sra_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, m), s.half), s.shift);
  }
  static Factor shifted(I32 x, const Factor& m, const Scale& s) {
    return {shifted8(x, m.even, s), shifted8(_mm512_srli_epi64(x, 32), m.odd, s)};
  }
  // The lower halves of the even and odd numbers as one vector.
  static I32 join(__m512i even, __m512i odd) {
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  static __m512i saturated(__m512i v) {
    return _mm512_max_epi64(_mm512_min_epi64(v, _mm512_set1_epi64(INT32_MAX)), _mm512_set1_epi64(INT32_MIN));
  }
  static I32 requant(I32 acc, const Factor& m, const Factor& b, const Scale& s) {
    const Factor y = shifted(acc, m, s);
    return join(saturated(_mm512_add_epi64(y.even, b.even)), saturated(_mm512_add_epi64(y.odd, b.odd)));
  }
  // The same without b, where the result is known to fit into 32 bits.
  static I32 requant_fits(I32 acc, const Factor& m, const Scale& s) {
    const Factor y = shifted(acc, m, s);
    return join(y.even, y.odd);
  }

  static I32 clip(I32 v, int32_t lo, int32_t hi) {
    return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_set1_epi32(lo)), _mm512_set1_epi32(hi));
  }
  static I32 smaller(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
  static I32 larger(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
  static I32 multiply(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
  static I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
  static I32 shift_right(I32 a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static size_t count_nonzero(const uint8_t* p, size_t n) {
    size_t count = 0, i = 0;
    for (; i + 64 <= n; i += 64) {
      const __m512i v = _mm512_loadu_si512(p + i);
      count += static_cast<size_t>(_mm_popcnt_u64(_mm512_test_epi8_mask(v, v)));
    }
    for (; i < n; ++i) count += p[i] != 0;
    return count;
  }

  static I32 load_codes(const uint8_t* p, int n) {
    return n >= kBytes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
  }
  static uint64_t plane(I32 codes, int p) { return _mm512_test_epi8_mask(codes, _mm512_set1_epi8(static_cast<char>(1 << p))); }
  static int32_t count_bits(uint64_t bits) { return static_cast<int32_t>(_mm_popcnt_u64(bits)); }
  static I32 broadcast32(const uint8_t* p) { return broadcast(p); }
  // Without vpopcntd (avx512_popcount.cc): both halves of every byte are looked up, and their counts added by a dot product.
  static I32 count_and(I32 acc, I32 codes, I32 weights) {
    const __m512i v = _mm512_and_si512(codes, weights), low = _mm512_set1_epi8(15), one = _mm512_set1_epi8(1);
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i half = _mm512_shuffle_epi8(table, _mm512_and_si512(v, low));
    const __m512i other = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    return _mm512_dpbusd_epi32(acc, _mm512_add_epi8(half, other), one);
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static I32 load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
  static I32 add8(I32 a, const int8_t* p) { return _mm512_add_epi8(a, _mm512_loadu_si512(p)); }
  // A value the compiler must not know anything about.
  static I32 opaque(I32 v) {
#ifdef __GNUC__
    __asm__ volatile("" : "+v"(v));
#endif
    return v;
  }
  static I32 add8(I32 a, I32 b) { return _mm512_add_epi8(a, b); }
  static double spin_popcount(size_t rounds) { return cpu_has_avx512_popcount() ? spin_popcount_avx512(rounds) : 0; }
  // acc[j] += byte j of every lane, signed.
  static void flush8(I32* acc, I32 part) {
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], _mm512_set1_epi32(1 << 8 * j), part);
  }
  // The same, unsigned and times a number up to 127.
  static void flush8_unsigned(I32* acc, I32 part, int times = 1) {
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], part, _mm512_set1_epi32(times << 8 * j));
  }
  // Depthwise convolution by dot products of four rows: depthwise_quads.h.
  static constexpr bool kQuads = true, kPairs = false;
  static void store_bytes(uint8_t* p, I32 v) { _mm512_storeu_si512(p, v); }
  // The codes of four rows in every lane become those of three and of a new row, of which 16 are given. VBMI2 has vpshrdd
  // for it, which takes as many instructions, since it wants widened codes.
  struct NextQuad {
    __m512i places = opaque(_mm512_setr_epi32(0, 1 << 24, 2 << 24, 3 << 24, 4 << 24, 5 << 24, 6 << 24, 7 << 24, 8 << 24, 9 << 24, 10 << 24, 11 << 24,
                                              12 << 24, 13 << 24, 14 << 24, 15 << 24));
    I32 operator()(I32 quad, const uint8_t* codes) const {
      const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      return _mm512_mask_shuffle_epi8(_mm512_srli_epi32(quad, 8), 0x8888888888888888u, all, places);
    }
  };
  using JoinedCodes = Bytes;
  // Neurons on sums: lif_sums.h.
  static constexpr bool kSums = true;
  static void store_s16(int16_t* p, I32 v, int lanes) {
    const __m256i narrow = _mm512_cvtepi32_epi16(v);
    if (lanes >= kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
    else _mm256_mask_storeu_epi16(p, mask(lanes), narrow);
  }
  static I32 widen_s16(const int16_t* p, int lanes) {
    return lanes == kLanes ? widen_s16(p) : _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask(lanes), p));
  }
  static F32 floats(I32 v) { return _mm512_cvtepi32_ps(v); }
  static F32 load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static F32 splat_float(float v) { return _mm512_set1_ps(v); }
  static F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 clip(F32 v, F32 lo, F32 hi) { return _mm512_min_ps(_mm512_max_ps(v, lo), hi); }
  static I32 whole(F32 v) { return _mm512_cvttps_epi32(v); }
  static I32 rounded(F32 v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  struct Lookup {  // of 32 numbers
    F32 low, high;
    explicit Lookup(const float* p) : low(_mm512_loadu_ps(p)), high(_mm512_loadu_ps(p + 16)) {}
    F32 operator()(I32 at) const { return _mm512_permutex2var_ps(low, at, high); }
  };
  static F32 zero_where(__mmask16 where, F32 v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(~where), v); }
  static F32 sub_where(__mmask16 where, F32 a, F32 b) { return _mm512_mask_sub_ps(a, where, a, b); }
  static __mmask16 above(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static __mmask16 not_below(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static I32 widen_s16(const int16_t* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static constexpr bool kCarrySave = true;
  static I32 majority(I32 a, I32 b, I32 c) { return _mm512_ternarylogic_epi32(a, b, c, 0xe8); }
  static I32 parity(I32 a, I32 b, I32 c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  // What 64 outputs count, in planes of bits `kStep` bytes apart, least output first.
  template <size_t kStep>
  static void count_planes(const uint8_t* from, int planes, I32* count) {
    I32 pairs[2];
    count_pairs<kStep>(from, planes, pairs);
    for (int i = 0; i < 2; ++i) widen_u16(pairs[i], count + 2 * i);
  }
  // Twice the counts, less the number of events.
  static void store_sums(const I32* pairs, int32_t events, int16_t* to, int outputs) {
    const I32 all = _mm512_set1_epi16(static_cast<short>(events));
    const uint64_t there = outputs >= 64 ? ~uint64_t{0} : (uint64_t{1} << outputs) - 1;
    for (int i = 0; i < 2; ++i)
      _mm512_mask_storeu_epi16(to + 32 * i, static_cast<__mmask32>(there >> 32 * i),
                               _mm512_sub_epi16(_mm512_add_epi16(pairs[i], pairs[i]), all));
  }
  // In 16 bits.
  template <size_t kStep>
  static void count_pairs(const uint8_t* from, int planes, I32* sum) {
    sum[0] = sum[1] = zero();
    __m512i place = _mm512_set1_epi16(1);
    for (int p = 0; p < planes; ++p, from += kStep) {
      uint32_t bits[2];
      memcpy(bits, from, 8);
      for (int i = 0; i < 2; ++i) sum[i] = _mm512_mask_add_epi16(sum[i], bits[i], sum[i], place);
      place = _mm512_add_epi16(place, place);
    }
  }
  static void widen_u16(__m512i v, I32* to) {
    to[0] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    to[1] = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
  }
  // Four lanes of a quarter of a vector.
  static void store_first_lane(uint8_t* p, I32 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(v)); }
  static void store_lanes(uint8_t* p, size_t step, I32 v) {
    store_first_lane(p, v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + step), _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * step), _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * step), _mm512_extracti32x4_epi32(v, 3));
  }
  static I32 lanes_down(I32 v) { return _mm512_alignr_epi64(zero(), v, 2); }
  static I32 low_nibbles(I32 v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  // Appends every channel's number times kEventEntry, plus `base`, as often as its code says, in no order; may write 64 entries too many.
  static size_t append_events(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
    return cpu_has_avx512_compress() ? append_events_avx512(to, count, codes, channels, base)
                                     : append_events_by_16(to, count, codes, channels, base);
  }
  // The same for bit `plane` of the codes, once each.
  static size_t append_plane(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base, int plane) {
    if (cpu_has_avx512_compress()) return append_plane_avx512(to, count, codes, channels, base, plane);
    for (int c = 0; c < channels; c += kBytes) {
      const __m512i code = load_codes(codes + c, channels - c);
      put_by_16(to, count, c * kEventEntry + base, _mm512_test_epi8_mask(code, _mm512_set1_epi8(static_cast<char>(1 << plane))));
    }
    return count;
  }
  static void put_by_16(uint16_t* to, size_t& count, int first, uint64_t has) {
    const __m512i numbers = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                               _mm512_set1_epi32(kEventEntry));
    for (int i = 0; i < kBytes; i += kLanes, has >>= kLanes) {
      const __mmask16 some = static_cast<__mmask16>(has);
      const __m512i number = _mm512_maskz_compress_epi32(some, _mm512_add_epi32(numbers, _mm512_set1_epi32(first + i * kEventEntry)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + count), _mm512_cvtepi32_epi16(number));
      count += _mm_popcnt_u32(some);
    }
  }
  static size_t append_events_by_16(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
    for (int c = 0; c < channels; c += kBytes) {
      const __m512i code = load_codes(codes + c, channels - c);
      int least = 1;
      // Whether any of 64 codes reaches the next count is told well beforehand, whether one of 16 does is not.
      for (uint64_t has = _mm512_test_epi8_mask(code, code); has;
           has = _mm512_cmpge_epu8_mask(code, _mm512_set1_epi8(static_cast<char>(++least))))
        put_by_16(to, count, c * kEventEntry + base, has);
    }
    return count;
  }
  // to[i] = from[i] + row; may write and read 64 entries too many.
  static void copy_events(uint16_t* to, const uint16_t* from, size_t n, uint16_t row) {
    const __m512i offset = _mm512_set1_epi16(static_cast<short>(row));
    const auto some = [&](size_t i) { _mm512_storeu_si512(to + i, _mm512_add_epi16(_mm512_loadu_si512(from + i), offset)); };
    some(0), some(32);  // in any case: most lists are that short, and whether one is shorter cannot be told beforehand
    for (size_t i = 64; i < n; i += 32) some(i);
  }
  static I32 plus_one_above(I32 v, I32 a, I32 b) {  // v + (a > b)
    return _mm512_mask_add_epi32(v, _mm512_cmpgt_epi32_mask(a, b), v, _mm512_set1_epi32(1));
  }
  static I32 more(I32 a, I32 b) { return _mm512_movm_epi32(_mm512_cmpgt_epi32_mask(a, b)); }
  static I32 not_(I32 a) { return _mm512_xor_si512(a, _mm512_set1_epi32(-1)); }
  static I32 and_(I32 a, I32 b) { return _mm512_and_si512(a, b); }
  static I32 select(I32 where, I32 a, I32 b) { return _mm512_ternarylogic_epi32(where, a, b, 0xca); }
  // Which lanes fired, as bits.
  using Mask = __mmask16;
  static Mask above(I32 a, I32 b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static I32 only(Mask where, I32 v) { return _mm512_maskz_mov_epi32(where, v); }
  static I32 zero_where(Mask where, I32 v) { return _mm512_maskz_mov_epi32(static_cast<__mmask16>(~where), v); }
  static void store_spikes(uint8_t* p, Mask spikes, int lanes) {
    const __m128i codes = _mm_maskz_set1_epi8(spikes, 1);
    if (lanes >= kLanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    else _mm_mask_storeu_epi8(p, mask(lanes), codes);
  }
  // On Zen 5 the instruction for it takes 1.7 times as long as loading word by word.
  static I32 gather(const uint32_t* p, I32 at) {
    alignas(64) uint32_t place[kLanes];
    _mm512_store_si512(place, at);
    const auto four = [=](const uint32_t* i) {
      const __m128i two = _mm_insert_epi32(_mm_cvtsi32_si128(static_cast<int>(p[i[0]])), static_cast<int>(p[i[1]]), 1);
      return _mm_insert_epi32(_mm_insert_epi32(two, static_cast<int>(p[i[2]]), 2), static_cast<int>(p[i[3]]), 3);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(four(place)), four(place + 4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(four(place + 8)), four(place + 12), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static I32 splat(int32_t v) { return _mm512_set1_epi32(v); }
  static I32 sub(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
  static I32 shift_left(I32 a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Overflow: both have the same sign, and the sum another one. It becomes the limit on the other side.
  static I32 add_saturating(I32 a, I32 b) {
    const I32 sum = _mm512_add_epi32(a, b);
    const I32 over = _mm512_ternarylogic_epi32(a, b, sum, 0x42);  // its sign: a and b agree, and the sum does not
    return _mm512_mask_xor_epi32(sum, _mm512_movepi32_mask(over), _mm512_srai_epi32(sum, 31),
                                 _mm512_set1_epi32(INT32_MIN));
  }
};

// Weights of kBits bits, 8 / kBits to a byte. They stay at the top of their bytes, which saves sign extension: sums are
// 2^kScaleBits times as large and shifted down at the end.
template <int kBits>
struct Avx512::Narrow : Avx512 {
  static constexpr int kFields = 8 / kBits, kScaleBits = 8 - kBits;
  static void put_weight(int8_t* at, int field, int8_t w) {
    *at = static_cast<int8_t>(static_cast<uint8_t>(*at) | (w & ((1 << kBits) - 1)) << field * kBits);
  }
  static I32 unpack(I32 packed, int field) {
    const I32 top = _mm512_set1_epi8(static_cast<char>(256 - (1 << kScaleBits)));
    return _mm512_and_si512(_mm512_slli_epi16(packed, kScaleBits - field * kBits), top);
  }
  static I32 unscale(I32 acc) { return _mm512_srai_epi32(acc, kScaleBits); }
};

}  // namespace
}  // namespace bitspike
