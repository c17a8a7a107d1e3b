// AVX2. vpmaddubsw would multiply 8-bit codes directly but saturates its 16-bit sums, so codes and weights are widened
// to 16 bits and vpmaddwd does the exact work: 16 products per instruction, then one add.
#include <immintrin.h>

#include "bits.h"
#include "elementwise.h"

namespace bitspike {
namespace {

struct Avx2 {
  using I32 = __m256i;
  using Code = int16_t;
  using Weight = int16_t;
  static constexpr int kUnit = 2, kLanes = 8, kPixels = 4, kVectors = 2;
  static constexpr int kBytes = 32, kNibbleVectors = 2, kByteVectors = 2;
  static constexpr int kSignedOffset = 0, kUnsignedOffset = 0;

  static __m256i mask(int lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static I32 zero() { return _mm256_setzero_si256(); }
  static I32 load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I32 load(const int32_t* p, int lanes) {
    return lanes == kLanes ? load(p) : _mm256_maskload_epi32(p, mask(lanes));
  }
  static constexpr int kFields = 1, kScaleBits = 0;
  static void put_weight(int16_t* at, int, int8_t w) { *at = w; }
  static uint32_t start(int8_t w, int32_t offset) { return 0u - static_cast<uint32_t>(w * offset); }
  static I32 unpack(I32 packed, int) { return packed; }
  static I32 unscale(I32 acc) { return acc; }
  // Depthwise convolution in 16 bits: depthwise_pairs.h.
  static constexpr bool kQuads = false, kPairs = true;
  static constexpr bool kSums = false;
  static void store_bytes(uint8_t* p, I32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I32 side_by_side_low(I32 a, I32 b) { return _mm256_unpacklo_epi8(a, b); }
  static I32 side_by_side_high(I32 a, I32 b) { return _mm256_unpackhi_epi8(a, b); }
  static I32 multiply_pairs(I32 codes, I32 weights) { return _mm256_maddubs_epi16(codes, weights); }
  static I32 add16(I32 a, I32 b) { return _mm256_add_epi16(a, b); }
  // Every 16 bytes of `low` are followed by those of `high`.
  static void store_in_order(int16_t* p, I32 low, I32 high) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm256_permute2x128_si256(low, high, 0x31));
  }
  static I32 widen_s16(const int16_t* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I32 xor_(I32 a, I32 b) { return _mm256_xor_si256(a, b); }
  static I32 shift_left_each(I32 a, I32 n) { return _mm256_sllv_epi32(a, n); }
  template <int kBits>
  struct Narrow;

  static I32 load_weights(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, I32 v, int lanes) {
    if (lanes >= kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    else _mm256_maskstore_epi32(p, mask(lanes), v);
  }
  static void store_codes(uint8_t* p, I32 v, int lanes) {
    const __m256i low_bytes = _mm256_shuffle_epi8(
        v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const uint64_t low = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(low_bytes)));
    const uint64_t high = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(low_bytes, 1)));
    const uint64_t codes = low | high << 32;
    memcpy(p, &codes, lanes);
  }

  static I32 broadcast(const int16_t* p) {
    int32_t unit;
    memcpy(&unit, p, 4);
    return _mm256_set1_epi32(unit);
  }
  static I32 dot(I32 acc, I32 codes, I32 weights) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(codes, weights));
  }
  static I32 dot16(I32 acc, I32 code, I32 weight) { return dot(acc, code, weight); }

  static I32 widen_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I32 widen_s8(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I32 widen_u8(const uint8_t* p, int lanes) {
    if (lanes == kLanes) return widen_u8(p);
    uint8_t codes[kLanes] = {};
    memcpy(codes, p, lanes);
    return widen_u8(codes);
  }
  static I32 widen_s8(const uint8_t* p, int lanes) {
    if (lanes == kLanes) return widen_s8(p);
    uint8_t codes[kLanes] = {};
    memcpy(codes, p, lanes);
    return widen_s8(codes);
  }

  template <bool kSigned>
  static I32 tap_code(const uint8_t* p, int lanes) {
    return kSigned ? widen_s8(p, lanes) : widen_u8(p, lanes);
  }
  static I32 shift_right_zero(I32 a, int n) { return _mm256_srli_epi32(a, n); }
  static I32 or_(I32 a, I32 b) { return _mm256_or_si256(a, b); }

  static void convert(int16_t* to, const uint8_t* from, size_t n, bool is_signed) {
    const int8_t* from_signed = reinterpret_cast<const int8_t*>(from);
    if (is_signed)
      for (size_t i = 0; i < n; ++i) to[i] = from_signed[i];
    else
      for (size_t i = 0; i < n; ++i) to[i] = from[i];
  }
  static const int16_t* in_place(const Conv&, const uint8_t*, int, int) { return nullptr; }

  // A per-output number as int64, lanes 0..3 and 4..7.
  struct Factor {
    __m256i low, high;
    explicit Factor(__m256i v)
        : low(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v))),
          high(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1))) {}
    explicit Factor(const int32_t* p) : Factor(load(p)) {}
    Factor(__m256i l, __m256i h) : low(l), high(h) {}
    explicit Factor(int64_t v) : low(_mm256_set1_epi64x(v)), high(low) {}
  };
  static Factor multiplier(const int32_t* p) { return Factor(p); }
  static Factor factor(const int32_t* p, int lanes) { return Factor(load(p, lanes)); }
  static Factor no_bias() { return Factor(zero(), zero()); }

  // There is no 64-bit arithmetic shift: shift x + 2^63 logically, then take 2^63 >> s off again.
  struct Scale {
    __m256i half_and_bias, bias_after;
    __m128i shift;
    explicit Scale(int s)
        : half_and_bias(_mm256_set1_epi64x(static_cast<int64_t>((uint64_t{1} << 63) +
                                                                (s > 0 ? uint64_t{1} << (s - 1) : 0)))),
          bias_after(_mm256_set1_epi64x(static_cast<int64_t>(uint64_t{1} << (63 - s)))),
          shift(_mm_cvtsi32_si128(s)) {}
  };

  static __m256i shifted4(__m128i x, __m256i m, const Scale& s) {
    const __m256i product = _mm256_mul_epi32(_mm256_cvtepi32_epi64(x), m);
    return _mm256_sub_epi64(_mm256_srl_epi64(_mm256_add_epi64(product, s.half_and_bias), s.shift), s.bias_after);
  }
  static Factor shifted(I32 x, const Factor& m, const Scale& s) {
    return {shifted4(_mm256_castsi256_si128(x), m.low, s), shifted4(_mm256_extracti128_si256(x, 1), m.high, s)};
  }
  static __m256i requant4(__m128i acc, __m256i m, __m256i b, const Scale& s) {
    __m256i y = _mm256_add_epi64(shifted4(acc, m, s), b);
    const __m256i most = _mm256_set1_epi64x(INT32_MAX), least = _mm256_set1_epi64x(INT32_MIN);
    y = _mm256_blendv_epi8(y, most, _mm256_cmpgt_epi64(y, most));
    return _mm256_blendv_epi8(y, least, _mm256_cmpgt_epi64(least, y));
  }
  static I32 requant(I32 acc, const Factor& m, const Factor& b, const Scale& s) {
    const __m256i low = requant4(_mm256_castsi256_si128(acc), m.low, b.low, s);
    const __m256i high = requant4(_mm256_extracti128_si256(acc, 1), m.high, b.high, s);
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(low, even), _mm256_permutevar8x32_epi32(high, even), 0xf0);
  }
  // The same without b, where the result is known to fit into 32 bits.
  static I32 requant_fits(I32 acc, const Factor& m, const Scale& s) {
    const Factor y = shifted(acc, m, s);
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(y.low, even), _mm256_permutevar8x32_epi32(y.high, even), 0xf0);
  }

  static I32 clip(I32 v, int32_t lo, int32_t hi) {
    return _mm256_min_epi32(_mm256_max_epi32(v, _mm256_set1_epi32(lo)), _mm256_set1_epi32(hi));
  }
  static I32 smaller(I32 a, I32 b) { return _mm256_min_epi32(a, b); }
  static I32 larger(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
  static I32 multiply(I32 a, I32 b) { return _mm256_mullo_epi32(a, b); }
  static I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
  static I32 shift_right(I32 a, int n) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static size_t count_nonzero(const uint8_t* p, size_t n) {
    size_t zeros = 0, i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      zeros += static_cast<size_t>(
          _mm_popcnt_u32(static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())))));
    }
    for (; i < n; ++i) zeros += p[i] == 0;
    return n - zeros;
  }

  static I32 load_codes(const uint8_t* p, int n) {
    uint8_t codes[kBytes] = {};
    if (n < kBytes) p = static_cast<const uint8_t*>(memcpy(codes, p, n));
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static uint64_t plane(I32 codes, int p) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(codes, _mm_cvtsi32_si128(7 - p))));
  }
  static int32_t count_bits(uint64_t bits) { return static_cast<int32_t>(_mm_popcnt_u64(bits)); }
  static I32 broadcast32(const uint8_t* p) { return broadcast(reinterpret_cast<const int16_t*>(p)); }
  // Bits are counted by looking up both halves of every byte; two multiplications by 1 add the bytes of a lane up.
  static I32 count_and(I32 acc, I32 codes, I32 weights) {
    const __m256i v = _mm256_and_si256(codes, weights), low = _mm256_set1_epi8(15);
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i ones = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, _mm256_set1_epi8(1)),
                                                   _mm256_set1_epi16(1)));
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static I32 load_bytes(const int8_t* p) { return load_weights(reinterpret_cast<const int16_t*>(p)); }
  static I32 add8(I32 a, const int8_t* p) { return _mm256_add_epi8(a, load_bytes(p)); }
  // A value the compiler must not know anything about.
  static I32 opaque(I32 v) {
#ifdef __GNUC__
    __asm__ volatile("" : "+x"(v));
#endif
    return v;
  }
  static I32 add8(I32 a, I32 b) { return _mm256_add_epi8(a, b); }
  static double spin_popcount(size_t rounds);
  // acc[j] += byte j of every lane, signed.
  static void flush8(I32* acc, I32 part) {
    acc[0] = _mm256_add_epi32(acc[0], _mm256_srai_epi32(_mm256_slli_epi32(part, 24), 24));
    acc[1] = _mm256_add_epi32(acc[1], _mm256_srai_epi32(_mm256_slli_epi32(part, 16), 24));
    acc[2] = _mm256_add_epi32(acc[2], _mm256_srai_epi32(_mm256_slli_epi32(part, 8), 24));
    acc[3] = _mm256_add_epi32(acc[3], _mm256_srai_epi32(part, 24));
  }
  static constexpr bool kCarrySave = false;
  static void flush8_unsigned(I32* acc, I32 part) {
    const __m256i low = _mm256_set1_epi32(255);
    acc[0] = _mm256_add_epi32(acc[0], _mm256_and_si256(part, low));
    acc[1] = _mm256_add_epi32(acc[1], _mm256_and_si256(_mm256_srli_epi32(part, 8), low));
    acc[2] = _mm256_add_epi32(acc[2], _mm256_and_si256(_mm256_srli_epi32(part, 16), low));
    acc[3] = _mm256_add_epi32(acc[3], _mm256_srli_epi32(part, 24));
  }
  static I32 majority(I32 a, I32 b, I32 c) { return or_(and_(a, b), and_(c, xor_(a, b))); }
  static I32 parity(I32 a, I32 b, I32 c) { return xor_(c, xor_(a, b)); }
  // What 32 outputs count, in planes of bits `kStep` bytes apart, least output first.
  template <size_t kStep>
  static void count_planes(const uint8_t* from, int planes, I32* count) {
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    __m256i half[2] = {zero(), zero()};  // planes 0 to 7, and the others
    for (int p = planes - 1; p >= 0; --p) {
      int32_t bits;
      memcpy(&bits, from + p * kStep, 4);
      const __m256i set = _mm256_cmpeq_epi8(and_(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit), bit);  // -1
      __m256i& sum = half[p / 8];
      sum = _mm256_sub_epi8(_mm256_add_epi8(sum, sum), set);
    }
    alignas(32) uint8_t low[32], high[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), half[0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), half[1]);
    for (int v = 0; v < 4; ++v)
      count[v] = _mm256_add_epi32(widen_u8(low + 8 * v), _mm256_slli_epi32(widen_u8(high + 8 * v), 8));
  }
  // Four lanes of a quarter of a vector.
  static void store_first_lane(uint8_t* p, I32 v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v)); }
  static void store_lanes(uint8_t* p, size_t step, I32 v) {
    alignas(32) uint8_t lanes[kBytes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    for (int i = 0; i < 4; ++i) memcpy(p + i * step, lanes + 8 * i, 8);
  }
  static I32 lanes_down(I32 v) { return _mm256_blend_epi32(_mm256_permute4x64_epi64(v, 0x39), zero(), 0xc0); }
  static I32 low_nibbles(I32 v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  // Appends every channel's number times kEventEntry, plus `base`, as often as its code says.
  static size_t append_events(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
    for (int c = 0; c < channels; c += 32) {
      uint8_t last[32] = {};
      const uint8_t* from = codes + c;
      if (channels - c < 32) from = static_cast<const uint8_t*>(memcpy(last, from, channels - c));
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      unsigned has = ~static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
      for (; has; has &= has - 1) {
        const int i = static_cast<int>(_mm_popcnt_u32((has & (0u - has)) - 1));
        for (int n = from[i]; n > 0; --n) to[count++] = static_cast<uint16_t>((c + i) * kEventEntry + base);
      }
    }
    return count;
  }
  // to[i] = from[i] + row; may write and read 16 entries too many.
  static void copy_events(uint16_t* to, const uint16_t* from, size_t n, uint16_t row) {
    const __m256i offset = _mm256_set1_epi16(static_cast<short>(row));
    for (size_t i = 0; i < n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_add_epi16(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(from + i)), offset));
  }
  static I32 plus_one_above(I32 v, I32 a, I32 b) { return _mm256_sub_epi32(v, _mm256_cmpgt_epi32(a, b)); }
  static I32 more(I32 a, I32 b) { return _mm256_cmpgt_epi32(a, b); }
  static I32 not_(I32 a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }
  static I32 and_(I32 a, I32 b) { return _mm256_and_si256(a, b); }
  static I32 select(I32 where, I32 a, I32 b) { return _mm256_blendv_epi8(b, a, where); }
  // Which lanes fired: as a mask of vectors here.
  using Mask = I32;
  static Mask above(I32 a, I32 b) { return more(a, b); }
  static I32 only(Mask where, I32 v) { return and_(where, v); }
  static I32 zero_where(Mask where, I32 v) { return and_(not_(where), v); }
  static void store_spikes(uint8_t* p, Mask spikes, int lanes) { store_codes(p, and_(spikes, splat(1)), lanes); }
  static I32 gather(const uint32_t* p, I32 at) { return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), at, 4); }
  static I32 splat(int32_t v) { return _mm256_set1_epi32(v); }
  static I32 sub(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
  static I32 shift_left(I32 a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Overflow: both have the same sign, and the sum another one. It becomes INT32_MAX or INT32_MIN by the sign of a.
  static I32 add_saturating(I32 a, I32 b) {
    const I32 sum = _mm256_add_epi32(a, b);
    const I32 over = _mm256_andnot_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(a, sum));
    const I32 limit = _mm256_xor_si256(_mm256_srai_epi32(a, 31), _mm256_set1_epi32(INT32_MAX));
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(limit), _mm256_castsi256_ps(over)));
  }
};

// Weights of kBits bits, 16 / kBits to a lane of 16 bits.
template <int kBits>
struct Avx2::Narrow : Avx2 {
  static constexpr int kFields = 16 / kBits;
  static void put_weight(int16_t* at, int field, int8_t w) {
    *at = static_cast<int16_t>(static_cast<uint16_t>(*at) | (w & ((1 << kBits) - 1)) << field * kBits);
  }
  static I32 unpack(I32 packed, int field) {
    return _mm256_srai_epi16(_mm256_slli_epi16(packed, 16 - kBits - field * kBits), 16 - kBits);
  }
};

double Avx2::spin_popcount(size_t rounds) {
  return spin_on<Avx2>(rounds, 32 * kLanes, [](I32 acc, I32 x) { return count_and(acc, x, opaque(acc)); });
}

}  // namespace

constexpr Kernels kernels_avx2 = kernels<Avx2>("avx2", popcount_kernel<Avx2>());

}  // namespace bitspike
