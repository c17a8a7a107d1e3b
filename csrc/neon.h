// NEON: 4 lanes of 32 bits. kDot: with the dot product of ARMv8.2 (sdot: 16 products of 8 bits an instruction); without it,
// codes and weights are widened to 16 bits (smull: 4 products an instruction, then one pairwise addition).
//
// sdot multiplies signed bytes, so u8 codes become code - 128, and the accumulators start at 128 * sum of the weights.
#pragma once
#include <arm_neon.h>

#include "bits.h"
#include "elementwise.h"

namespace bitspike {
namespace {

template <bool kDot>
struct NeonCodes {  // as int16
  using Code = int16_t;
  using Weight = int16_t;
  static constexpr int kUnit = 2, kUnsignedOffset = 0;
  static void convert(int16_t* to, const uint8_t* from, size_t n, bool is_signed) {
    const int8_t* from_signed = reinterpret_cast<const int8_t*>(from);
    if (is_signed)
      for (size_t i = 0; i < n; ++i) to[i] = from_signed[i];
    else
      for (size_t i = 0; i < n; ++i) to[i] = from[i];
  }
  // Lane i holds codes 2 i and 2 i + 1.
  static int32x4_t dot(int32x4_t acc, int32x4_t codes, int32x4_t weights) {
    const int16x8_t x = vreinterpretq_s16_s32(codes), w = vreinterpretq_s16_s32(weights);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(w)), high = vmull_high_s16(x, w);
    return vaddq_s32(acc, vpaddq_s32(low, high));
  }
  template <bool kSigned>
  static int32x4_t tap(int32x4_t code) {
    return code;
  }
  static int32x4_t keep(int32x4_t v, int left, int bits) {  // the `bits` bits below `left` others, with their sign
    return vreinterpretq_s32_s16(vshlq_s16(vshlq_s16(vreinterpretq_s16_s32(v), vdupq_n_s16(left)), vdupq_n_s16(bits - 16)));
  }
};

#ifdef __ARM_FEATURE_DOTPROD
template <>
struct NeonCodes<true> {
  using Code = int8_t;
  using Weight = int8_t;
  static constexpr int kUnit = 4, kUnsignedOffset = -128;
  static void convert(int8_t* to, const uint8_t* from, size_t n, bool is_signed) {
    const uint8_t flip = is_signed ? 0 : 0x80;
    for (size_t i = 0; i < n; ++i) to[i] = static_cast<int8_t>(from[i] ^ flip);
  }
  static int32x4_t dot(int32x4_t acc, int32x4_t codes, int32x4_t weights) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(weights));
  }
  template <bool kSigned>
  static int32x4_t tap(int32x4_t code) {
    return kSigned ? code : veorq_s32(code, vdupq_n_s32(0x80));
  }
  static int32x4_t keep(int32x4_t v, int left, int bits) {
    return vreinterpretq_s32_s8(vshlq_s8(vshlq_s8(vreinterpretq_s8_s32(v), vdupq_n_s8(left)), vdupq_n_s8(bits - 8)));
  }
};
#endif

template <bool kDot>
struct Neon : NeonCodes<kDot> {
  using Base = NeonCodes<kDot>;
  using typename Base::Code;
  using typename Base::Weight;
  using I32 = int32x4_t;
  static constexpr int kLanes = 4, kPixels = 4, kVectors = 3;  // 12 accumulators, 3 weights, 1 code of 32 registers
  static constexpr int kBytes = 16, kNibbleVectors = 4, kByteVectors = 4;
  static constexpr int kSignedOffset = 0;

  static I32 zero() { return vdupq_n_s32(0); }
  static I32 load(const int32_t* p) { return vld1q_s32(p); }
  static I32 load(const int32_t* p, int lanes) {
    if (lanes == kLanes) return load(p);
    int32_t some[kLanes] = {};
    memcpy(some, p, lanes * sizeof(int32_t));
    return load(some);
  }
  static constexpr int kFields = 1, kScaleBits = 0;
  static void put_weight(Weight* at, int, int8_t w) { *at = w; }
  static uint32_t start(int8_t w, int32_t offset) { return 0u - static_cast<uint32_t>(w * offset); }
  static I32 unpack(I32 packed, int) { return packed; }
  static I32 unscale(I32 acc) { return acc; }
  template <int kBits>
  struct Narrow;

  static I32 load_weights(const Weight* p) { return vreinterpretq_s32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
  static void store(int32_t* p, I32 v, int lanes) {
    if (lanes >= kLanes) return vst1q_s32(p, v);
    int32_t some[kLanes];
    vst1q_s32(some, v);
    memcpy(p, some, lanes * sizeof(int32_t));
  }
  static void store_codes(uint8_t* p, I32 v, int lanes) {
    const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(v), vdup_n_s16(0)));
    const uint32_t codes = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    memcpy(p, &codes, lanes < kLanes ? lanes : kLanes);
  }

  static I32 broadcast32(const uint8_t* p) {
    int32_t unit;
    memcpy(&unit, p, 4);
    return vdupq_n_s32(unit);
  }
  static I32 broadcast(const Code* p) { return broadcast32(reinterpret_cast<const uint8_t*>(p)); }
  static I32 dot16(I32 acc, I32 code, I32 weight) { return NeonCodes<false>::dot(acc, code, weight); }

  static I32 widen_u8(const uint8_t* p, int lanes = kLanes) {
    uint32_t four = 0;
    memcpy(&four, p, lanes);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
  }
  static I32 widen_s8(const uint8_t* p, int lanes = kLanes) {
    uint32_t four = 0;
    memcpy(&four, p, lanes);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))));
  }
  template <bool kSigned>
  static I32 tap_code(const uint8_t* p, int lanes) {
    return Base::template tap<kSigned>(kSigned ? widen_s8(p, lanes) : widen_u8(p, lanes));
  }
  static const Code* in_place(const Conv&, const uint8_t*, int, int) { return nullptr; }

  // A per-output number as int64, lanes 0..1 and 2..3.
  struct Factor {
    int64x2_t low, high;
    explicit Factor(I32 v) : low(vmovl_s32(vget_low_s32(v))), high(vmovl_high_s32(v)) {}
    explicit Factor(const int32_t* p) : Factor(load(p)) {}
    Factor(int64x2_t l, int64x2_t h) : low(l), high(h) {}
    explicit Factor(int64_t v) : low(vdupq_n_s64(v)), high(low) {}
  };
  static Factor multiplier(const int32_t* p) { return Factor(p); }
  static Factor factor(const int32_t* p, int lanes) { return Factor(load(p, lanes)); }
  static Factor no_bias() { return Factor(zero()); }

  struct Scale {
    int64x2_t right;
    explicit Scale(int s) : right(vdupq_n_s64(-s)) {}
  };

  // srshl rounds half up, as rshift does, and leaves its argument alone for a shift of 0.
  static Factor shifted(I32 x, const Factor& m, const Scale& s) {
    const int64x2_t low = vmull_s32(vget_low_s32(x), vmovn_s64(m.low));
    const int64x2_t high = vmull_s32(vget_high_s32(x), vmovn_s64(m.high));
    return {vrshlq_s64(low, s.right), vrshlq_s64(high, s.right)};
  }
  static I32 requant(I32 acc, const Factor& m, const Factor& b, const Scale& s) {
    const Factor y = shifted(acc, m, s);
    return vqmovn_high_s64(vqmovn_s64(vaddq_s64(y.low, b.low)), vaddq_s64(y.high, b.high));
  }
  static I32 requant_fits(I32 acc, const Factor& m, const Scale& s) {
    const Factor y = shifted(acc, m, s);
    return vmovn_high_s64(vmovn_s64(y.low), y.high);
  }

  static I32 clip(I32 v, int32_t lo, int32_t hi) { return vminq_s32(vmaxq_s32(v, vdupq_n_s32(lo)), vdupq_n_s32(hi)); }
  static I32 smaller(I32 a, I32 b) { return vminq_s32(a, b); }
  static I32 larger(I32 a, I32 b) { return vmaxq_s32(a, b); }
  static I32 multiply(I32 a, I32 b) { return vmulq_s32(a, b); }
  static I32 add(I32 a, I32 b) { return vaddq_s32(a, b); }
  static I32 sub(I32 a, I32 b) { return vsubq_s32(a, b); }
  static I32 add_saturating(I32 a, I32 b) { return vqaddq_s32(a, b); }
  static I32 shift_left(I32 a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
  static constexpr bool kQuads = false, kPairs = false;
  static constexpr bool kSums = false;
  static I32 xor_(I32 a, I32 b) { return veorq_s32(a, b); }
  static I32 shift_left_each(I32 a, I32 n) { return vshlq_s32(a, n); }  // 0 for 32 and more
  static I32 shift_right(I32 a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
  static I32 shift_right_zero(I32 a, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
  }
  static I32 plus_one_above(I32 v, I32 a, I32 b) { return vsubq_s32(v, vreinterpretq_s32_u32(vcgtq_s32(a, b))); }
  static I32 more(I32 a, I32 b) { return vreinterpretq_s32_u32(vcgtq_s32(a, b)); }
  static I32 not_(I32 a) { return vmvnq_s32(a); }
  static I32 and_(I32 a, I32 b) { return vandq_s32(a, b); }
  static I32 or_(I32 a, I32 b) { return vorrq_s32(a, b); }
  static I32 select(I32 where, I32 a, I32 b) { return vbslq_s32(vreinterpretq_u32_s32(where), a, b); }
  // Which lanes fired: as a mask of vectors here.
  using Mask = I32;
  static Mask above(I32 a, I32 b) { return more(a, b); }
  static I32 only(Mask where, I32 v) { return and_(where, v); }
  static I32 zero_where(Mask where, I32 v) { return and_(not_(where), v); }
  static void store_spikes(uint8_t* p, Mask spikes, int lanes) { store_codes(p, and_(spikes, splat(1)), lanes); }
  static I32 gather(const uint32_t* p, I32 at) {
    const uint32_t found[kLanes] = {p[vgetq_lane_s32(at, 0)], p[vgetq_lane_s32(at, 1)], p[vgetq_lane_s32(at, 2)],
                                    p[vgetq_lane_s32(at, 3)]};
    return vreinterpretq_s32_u32(vld1q_u32(found));
  }
  static I32 splat(int32_t v) { return vdupq_n_s32(v); }

  static size_t count_nonzero(const uint8_t* p, size_t n) {
    size_t count = 0, i = 0;
    for (; i + 16 <= n; i += 16) {
      const uint8x16_t v = vld1q_u8(p + i);
      count += vaddvq_u8(vshrq_n_u8(vtstq_u8(v, v), 7));
    }
    for (; i < n; ++i) count += p[i] != 0;
    return count;
  }

  // ------------------------------------------------------------------------------------------------ popcount
  static I32 load_codes(const uint8_t* p, int n) {
    uint8_t codes[kBytes] = {};
    if (n < kBytes) p = static_cast<const uint8_t*>(memcpy(codes, p, n));
    return vreinterpretq_s32_u8(vld1q_u8(p));
  }
  // Bit p of every byte, the first byte's lowest.
  static uint64_t plane(I32 codes, int p) {
    const uint8x16_t place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vtstq_u8(vreinterpretq_u8_s32(codes), vdupq_n_u8(static_cast<uint8_t>(1 << p)));
    const uint8x16_t placed = vandq_u8(bits, place);
    return vaddv_u8(vget_low_u8(placed)) | static_cast<uint64_t>(vaddv_u8(vget_high_u8(placed))) << 8;
  }
  static int32_t count_bits(uint64_t bits) { return __builtin_popcountll(bits); }
  static I32 count_and(I32 acc, I32 codes, I32 weights) {
    const uint8x16_t ones = vcntq_u8(vreinterpretq_u8_s32(vandq_s32(codes, weights)));
    return vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(acc), vpaddlq_u8(ones)));
  }

  // -------------------------------------------------------------------------------------------------- events
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
  static I32 load_bytes(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
  static I32 add8(I32 a, const int8_t* p) { return vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_s32(a), vld1q_s8(p))); }
  static I32 add8(I32 a, I32 b) { return vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))); }
  static I32 opaque(I32 v) {  // a value the compiler knows nothing about
    __asm__ volatile("" : "+w"(v));
    return v;
  }
  static double spin_popcount(size_t rounds) {
    return spin_on<Neon>(rounds, 32 * kLanes, [](I32 acc, I32 x) { return count_and(acc, x, opaque(acc)); });
  }
  // Byte j of every lane goes to accumulator j.
  static void flush8(I32* acc, I32 part) {
    acc[0] = vaddq_s32(acc[0], vshrq_n_s32(vshlq_n_s32(part, 24), 24));
    acc[1] = vaddq_s32(acc[1], vshrq_n_s32(vshlq_n_s32(part, 16), 24));
    acc[2] = vaddq_s32(acc[2], vshrq_n_s32(vshlq_n_s32(part, 8), 24));
    acc[3] = vsraq_n_s32(acc[3], part, 24);
  }
  static constexpr bool kCarrySave = false;
  static void flush8_unsigned(I32* acc, I32 part) {
    const int32x4_t low = vdupq_n_s32(255);
    for (int j = 0; j < 4; ++j) acc[j] = vaddq_s32(acc[j], vandq_s32(shift_right_zero(part, 8 * j), low));
  }
  static I32 majority(I32 a, I32 b, I32 c) { return select(xor_(a, b), c, a); }
  static I32 parity(I32 a, I32 b, I32 c) { return xor_(xor_(a, b), c); }
  // What 16 outputs count, in planes of bits `kStep` bytes apart, least output first.
  template <size_t kStep>
  static void count_planes(const uint8_t* from, int planes, I32* count) {
    const uint8x16_t place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t half[2] = {vdupq_n_u8(0), vdupq_n_u8(0)};  // planes 0 to 7, and the others
    for (int p = planes - 1; p >= 0; --p) {
      const uint8_t* at = from + p * kStep;
      const uint8x16_t set = vtstq_u8(vcombine_u8(vdup_n_u8(at[0]), vdup_n_u8(at[1])), place);  // all ones: -1
      half[p / 8] = vsubq_u8(vaddq_u8(half[p / 8], half[p / 8]), set);
    }
    const uint16x8_t low = vorrq_u16(vmovl_u8(vget_low_u8(half[0])), vshll_n_u8(vget_low_u8(half[1]), 8));
    const uint16x8_t high = vorrq_u16(vmovl_u8(vget_high_u8(half[0])), vshll_n_u8(vget_high_u8(half[1]), 8));
    count[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low)));
    count[1] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low)));
    count[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high)));
    count[3] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)));
  }
  // Four lanes of a quarter of a vector.
  static void store_first_lane(uint8_t* p, I32 v) {
    const int32_t first = vgetq_lane_s32(v, 0);
    memcpy(p, &first, 4);
  }
  static void store_lanes(uint8_t* p, size_t step, I32 v) {
    int32_t lanes[4];
    vst1q_s32(lanes, v);
    for (int i = 0; i < 4; ++i) memcpy(p + i * step, lanes + i, 4);
  }
  static I32 lanes_down(I32 v) { return vextq_s32(v, vdupq_n_s32(0), 1); }
  static I32 low_nibbles(I32 v) { return vandq_s32(v, vreinterpretq_s32_s8(vdupq_n_s8(15))); }
  static size_t append_events(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base) {
    for (int c = 0; c < channels; c += kBytes) {
      uint8_t last[kBytes] = {};
      const uint8_t* from = codes + c;
      if (channels - c < kBytes) from = static_cast<const uint8_t*>(memcpy(last, from, channels - c));
      const uint8x16_t v = vld1q_u8(from);
      // 4 bits per byte: all set where the byte is not 0
      uint64_t has = vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(vreinterpretq_u16_u8(vtstq_u8(v, v)), 4)), 0);
      while (has) {
        const int i = __builtin_ctzll(has) >> 2;
        for (int n = from[i]; n > 0; --n) to[count++] = static_cast<uint16_t>((c + i) * kEventEntry + base);
        has &= ~(uint64_t{15} << (4 * i));
      }
    }
    return count;
  }
  // Whole vectors: up to 7 entries past the end are written.
  static void copy_events(uint16_t* to, const uint16_t* from, size_t n, uint16_t row) {
    const uint16x8_t offset = vdupq_n_u16(row);
    for (size_t i = 0; i < n; i += 8) vst1q_u16(to + i, vaddq_u16(vld1q_u16(from + i), offset));
  }
};

// Weights of kBits bits, as many as fit into one of Weight.
template <bool kDot>
template <int kBits>
struct Neon<kDot>::Narrow : Neon<kDot> {
  using Weight = typename Neon<kDot>::Weight;
  static constexpr int kWidth = 8 * sizeof(Weight), kFields = kWidth / kBits;
  static void put_weight(Weight* at, int field, int8_t w) {
    *at = static_cast<Weight>(static_cast<uint16_t>(*at) | (w & ((1 << kBits) - 1)) << field * kBits);
  }
  static int32x4_t unpack(int32x4_t packed, int field) {
    return Neon<kDot>::keep(packed, kWidth - kBits - field * kBits, kBits);
  }
};

}  // namespace
}  // namespace bitspike
