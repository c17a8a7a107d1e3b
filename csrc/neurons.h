// Neurons over the primitives of tiles.h: the steps of a few of them at a time, their potentials in registers.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// rshift(x * m, s) of a lif, in the cheapest form that is exact. `plain`: m is 1 and s below 32, so that 32 bits suffice.
template <class V>
struct Shrink {
  using I32 = typename V::I32;
  bool plain;
  int shift;
  typename V::Factor m;
  typename V::Scale scale;

  Shrink(int32_t factor, int s) : plain(factor == 1 && s < 32), shift(s), m(int64_t{factor}), scale(s) {}
  // Only if plain. Half up: floor((u + 1) / 2) is u - floor(u / 2), which does not overflow.
  I32 narrow(I32 x) const {
    if (shift == 0) return x;
    return half(shift == 1 ? x : V::shift_right(x, shift - 1));
  }
  static I32 half(I32 x) { return V::sub(x, V::shift_right(x, 1)); }
  typename V::Factor wide(I32 x) const {
    if (plain && shift == 0) return typename V::Factor(x);
    return V::shifted(x, m, scale);
  }
  I32 saturated(I32 x) const { return plain ? narrow(x) : V::requant(x, m, V::no_bias(), scale); }
};

// rshift(x * m, s) for small x, without 64 bits: with m = 2^16 a + b and 0 <= b < 2^16, neither x a nor x b leaves 32 bits. Where
// s > 16 their sum is made 2^16 times too small, which drops nothing that rounding would see; elsewhere x a is shifted up, and
// what it loses above 32 bits the result does not have.
template <class V>
struct ShrinkSmall {
  using I32 = typename V::I32;
  I32 a, b, round;
  int down, up;

  // For |x| <= most.
  static bool fits(int32_t m, int s, int64_t most) {
    return most < 1 << 15 && s >= 1 && s <= 46 && (most * (m < 0 ? -int64_t{m} : m)) >> s < INT32_MAX;
  }
  // Only what `fits` may be called.
  ShrinkSmall(int32_t m, int s)
      : a(V::splat(m >> 16)), b(V::splat(m & 0xffff)), round(V::splat(s < 1 || s > 46 ? 0 : 1 << (s > 16 ? s - 17 : s - 1))),
        down(s > 16 ? s - 16 : s), up(s > 16 ? -1 : 16 - s) {}
  BITSPIKE_INLINE I32 operator()(I32 x) const {
    const I32 high = V::multiply(x, a), low = V::multiply(x, b);
    if (up >= 0) return V::add(V::shift_left(high, up), V::shift_right(V::add(low, round), down));
    return V::shift_right(V::add(V::add(high, V::shift_right(low, 16)), round), down);
  }
};

// Potential -> code by the table of a PackedLif.
template <class V>
struct Store {
  using I32 = typename V::I32;
  const PackedLif& p;

  BITSPIKE_INLINE I32 operator()(I32 v) const {
    if (!p.buckets) {
      I32 code = V::splat(p.entries - p.entries / 2);
      for (int e = 0; e < p.entries; ++e) code = V::add(code, V::more(V::splat(p.table[e]), v));  // -1 if above
      return code;
    }
    const Buckets& b = *p.buckets;
    const I32 place = V::sub(V::clip(v, b.first, b.last), V::splat(b.first));
    const I32 word = V::gather(b.words, V::shift_right_zero(place, b.shift));
    const I32 inside = V::and_(place, V::splat((1 << b.shift) - 1));
    const I32 above = V::more(V::and_(word, V::splat(Buckets::kNone)), inside);  // -1 if the bucket's entry is above v
    return V::add(V::add(V::shift_right_zero(word, Buckets::kOffsetBits), above), V::splat(1 - p.entries / 2));
  }
};

constexpr int kCountedEntries = 63;  // of a table without buckets: more are sooner searched than compared with all

// What is known of a neuron's numbers.
enum class LifForm {
  wide,    // nothing
  narrow,  // leak and gain are shifts
  half,    // both are halves, the reset is hard, and no sum overflows
  table,   // potentials are codes of a table
  codes,   // and the gain is a shift, a code's leak needs no 64 bits
};

// `packed` is a copy: what is stored through y may be anything's bytes.
template <class V, Lif::Reset kReset, LifForm kForm>
void lif_some(const PackedLif packed, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using I32 = typename V::I32;
  constexpr bool kTable = kForm == LifForm::table || kForm == LifForm::codes;
  const Lif& p = packed.lif;
  const Shrink<V> decay(p.decay_m, p.decay_s), gain(p.gain_m, p.gain_s);
  const ShrinkSmall<V> decay_code(p.decay_m, p.decay_s);
  const Store<V> store{packed};
  const int steps = p.steps;
  const I32 below = V::splat(p.strict ? p.threshold : p.threshold - 1), minus_amount = V::splat(-packed.amount);
  const auto some = [&](size_t i, int lanes) {
    I32 v = V::zero();
    for (int t = 0;; ++t) {
      const I32 drive = V::load(x + t * x_stride + i, lanes);
      I32 h;
      if (kForm == LifForm::half) h = t == 0 ? gain.half(drive) : V::add(decay.half(v), gain.half(drive));
      else if (t == 0) h = gain.saturated(drive);  // the potential is still 0
      else if (kForm == LifForm::narrow) h = V::add_saturating(decay.narrow(v), gain.narrow(drive));
      else if (kForm == LifForm::codes) h = V::add_saturating(decay_code(v), gain.narrow(drive));
      else h = V::requant(v, decay.m, gain.wide(drive), decay.scale);
      const typename V::Mask spike = V::above(h, below);
      V::store_spikes(y + t * y_stride + i, spike, lanes);
      if (t + 1 == steps) break;  // nobody asks for the last potential
      v = h;
      if (kReset == Lif::Reset::hard) v = V::zero_where(spike, h);
      if (kReset == Lif::Reset::soft) v = V::add_saturating(h, V::only(spike, minus_amount));
      if (kTable) v = store(v);
    }
  };
  size_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) some(i, V::kLanes);  // a number the compiler knows
  if (i < count) some(i, static_cast<int>(count - i));
}

template <class V, LifForm kForm>
void lif_reset(const PackedLif& packed, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using Reset = Lif::Reset;
  const Reset reset = packed.lif.reset;
  if constexpr (kForm == LifForm::half) return lif_some<V, Reset::hard, kForm>(packed, x, count, x_stride, y, y_stride);
  const auto run = reset == Reset::hard   ? lif_some<V, Reset::hard, kForm>
                   : reset == Reset::soft ? lif_some<V, Reset::soft, kForm>
                                          : lif_some<V, Reset::none, kForm>;
  run(packed, x, count, x_stride, y, y_stride);
}

template <class V>
void lif_packed(const PackedLif& packed, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  const Lif& p = packed.lif;
  // What has no vector form: a long table without buckets, and numbers whose neighbour or negative is no int32.
  if ((packed.table && !packed.buckets && packed.entries > kCountedEntries) || packed.amount == INT32_MIN ||
      p.threshold == INT32_MIN)
    return scalar_lif_packed(packed, x, count, x_stride, y, y_stride);
  const bool shifted = Shrink<V>(p.gain_m, p.gain_s).plain, narrow = shifted && Shrink<V>(p.decay_m, p.decay_s).plain;
  // A potential below the threshold and the largest drive: 2^30 - 1 and 2^30 at most.
  const bool half = narrow && p.decay_s == 1 && p.gain_s == 1 && p.reset == Lif::Reset::hard && p.threshold < INT32_MAX;
  const bool small = shifted && ShrinkSmall<V>::fits(p.decay_m, p.decay_s, packed.entries);
  const auto run = packed.table ? small ? lif_reset<V, LifForm::codes> : lif_reset<V, LifForm::table>
                   : half       ? lif_reset<V, LifForm::half>
                   : narrow     ? lif_reset<V, LifForm::narrow>
                                : lif_reset<V, LifForm::wide>;
  run(packed, x, count, x_stride, y, y_stride);
}

template <class V>
void lif(const Lif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  lif_packed<V>({p, p.threshold, nullptr, 0, nullptr}, x, count, x_stride, y, y_stride);
}

template <class V>
void ielif(const IeLif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using I32 = typename V::I32;
  const typename V::Factor decay(int64_t{p.decay_m}), one(int64_t{1}), zero(int64_t{0});
  const typename V::Scale decay_scale(p.decay_s), fraction(p.fraction_bits);
  for (size_t i = 0; i < count; i += V::kLanes) {
    const int lanes = count - i < V::kLanes ? static_cast<int>(count - i) : V::kLanes;
    I32 v = V::zero();
    for (int t = 0; t < p.steps; ++t) {
      const I32 u = V::add_saturating(v, V::load(x + t * x_stride + i, lanes));
      const I32 n = V::clip(V::requant(u, one, zero, fraction), 0, p.levels);
      V::store_codes(y + t * y_stride + i, n, lanes);
      // n << F may wrap, the difference does not: n is u rounded or less, so it lies in -2^(F-1) .. u.
      v = V::requant(V::sub(u, V::shift_left(n, p.fraction_bits)), decay, zero, decay_scale);
    }
  }
}

}  // namespace
}  // namespace bitspike
