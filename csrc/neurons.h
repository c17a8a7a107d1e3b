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
  I32 narrow(I32 x) const {  // only if plain; half up: the last bit that is shifted out is added
    if (shift == 0) return x;
    return V::add(V::shift_right(x, shift), V::and_(V::shift_right(x, shift - 1), V::splat(1)));
  }
  typename V::Factor wide(I32 x) const {
    if (plain && shift == 0) return typename V::Factor(x);
    return V::shifted(x, m, scale);
  }
  I32 saturated(I32 x) const { return plain ? narrow(x) : V::requant(x, m, V::no_bias(), scale); }
};

// Potential -> code by the table of a PackedLif.
template <class V>
struct Store {
  using I32 = typename V::I32;
  const PackedLif& p;

  I32 operator()(I32 v) const {
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

template <class V>
void lif_packed(const PackedLif& packed, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using I32 = typename V::I32;
  if (packed.table && !packed.buckets && packed.entries > kCountedEntries)
    return scalar_lif_packed(packed, x, count, x_stride, y, y_stride);
  const Lif& p = packed.lif;
  const Shrink<V> decay(p.decay_m, p.decay_s), gain(p.gain_m, p.gain_s);
  const Store<V> store{packed};
  const typename V::Factor one(int64_t{1}), minus_amount(-int64_t{packed.amount});
  const typename V::Scale unit(0);
  const I32 threshold = V::splat(p.threshold);
  const bool narrow = decay.plain && gain.plain, small_amount = packed.amount != INT32_MIN;
  for (size_t i = 0; i < count; i += V::kLanes) {
    const int lanes = count - i < V::kLanes ? static_cast<int>(count - i) : V::kLanes;
    I32 v = V::zero();
    for (int t = 0; t < p.steps; ++t) {
      const I32 drive = V::load(x + t * x_stride + i, lanes);
      I32 h;
      if (t == 0) h = gain.saturated(drive);  // the potential is still 0
      else if (narrow) h = V::add_saturating(decay.narrow(v), gain.narrow(drive));
      else h = V::requant(v, decay.m, gain.wide(drive), decay.scale);
      const I32 spike = p.strict ? V::more(h, threshold) : V::not_(V::more(threshold, h));
      V::store_codes(y + t * y_stride + i, V::and_(spike, V::splat(1)), lanes);
      if (t + 1 == p.steps) break;  // nobody asks for the last potential
      v = h;
      if (p.reset == Lif::Reset::hard) v = V::select(spike, V::zero(), h);
      if (p.reset == Lif::Reset::soft && small_amount)
        v = V::add_saturating(h, V::and_(spike, V::splat(-packed.amount)));
      else if (p.reset == Lif::Reset::soft)
        v = V::select(spike, V::requant(h, one, minus_amount, unit), h);
      if (packed.table) v = store(v);
    }
  }
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
