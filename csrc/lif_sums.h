// Neurons straight from the sums of a convolution, with the integers' spikes and without most of the integers' work.
//
// A spike is one bit of what a potential of 32 bits has to say, and rational numbers say it nearly always: how far they can be
// from the integers is proved beforehand (lif_of_sums.cc), roundings and stored codes included. What lies nearer to a threshold
// than that is in doubt, and the vector it is in is done again in integers, from the sums.
#pragma once
#include "finish.h"
#include "neurons.h"

namespace bitspike {
namespace {

// `lanes` elements from element `i` on, by definition.
template <class V>
BITSPIKE_NOINLINE void lif_in_doubt(const SumsLif& p, const Drives& in, size_t i, size_t channel, int lanes, uint8_t* y, size_t y_stride) {
  const int steps = p.exact.lif.steps;
  int32_t x[SumsLif::kMostSteps * V::kLanes];
  uint8_t spikes[SumsLif::kMostSteps * V::kLanes];
  using Factor = typename V::Factor;
  const Factor m = in.sums ? V::factor(p.m + channel, lanes) : V::no_bias(), b = in.sums ? V::factor(p.b + channel, lanes) : V::no_bias();
  const Factor residual_m(int64_t{p.scaled.m}), residual_b(int64_t{p.scaled.b});
  const typename V::Scale scale(p.shift), residual_scale(p.scaled.shift);
  for (int t = 0; t < steps; ++t) {
    typename V::I32 potential = V::zero();
    if (in.sums) potential = V::requant(V::widen_s16(in.sums + t * in.sums_step + i, lanes), m, b, scale);
    const size_t at = t * in.residual_step + i;
    if (in.residual) potential = V::add_saturating(potential, V::load(in.residual + at, lanes));
    if (in.codes)
      potential = V::add_saturating(potential, V::requant(V::widen_u8(in.codes + at, lanes), residual_m, residual_b, residual_scale));
    V::store(x + t * V::kLanes, potential, V::kLanes);
  }
  lif_packed<V>(p.exact, x, lanes, V::kLanes, spikes, V::kLanes);
  for (int t = 0; t < steps; ++t) memcpy(y + t * y_stride + i, spikes + t * V::kLanes, lanes);
}

enum class Residual { none, potentials, codes, alone };

// `p` and `in` are copies: what is stored through y may be anything's bytes.
template <class V, Lif::Reset kReset, bool kTable, Residual kResidual>
void lif_of_sums(const SumsLif p, const Drives in, size_t pixels, size_t channels, uint8_t* y, size_t y_stride) {
  using F32 = typename V::F32;
  const typename V::Lookup at_zero(p.pieces), slopes(p.pieces + SumsLif::kPieces);
  const F32 first = V::splat_float(p.first), last = V::splat_float(p.last);
  const F32 per = V::splat_float(p.per), offset = V::splat_float(p.offset);
  const F32 decay = V::splat_float(p.decay), residual = V::splat_float(p.residual), amount = V::splat_float(p.amount);
  const F32 below = V::splat_float(p.below), above = V::splat_float(p.above);
  const F32 below_first = V::splat_float(p.below_first), above_first = V::splat_float(p.above_first);
  const F32 furthest = V::splat_float(p.furthest), nearest = V::splat_float(-p.furthest);
  const F32 nothing = V::splat_float(0);
  const int steps = p.exact.lif.steps;
  const auto some = [&](size_t i, size_t channel, int lanes) {
    constexpr bool kSums = kResidual != Residual::alone;
    const F32 scale = kSums ? V::load_floats(p.scale + channel) : nothing, bias = kSums ? V::load_floats(p.bias + channel) : nothing;
    F32 v = decay;  // of no use before the second step
    typename V::Mask doubt = 0;
    for (int t = 0;; ++t) {
      F32 h = bias;
      if (kSums) h = V::multiply_add(V::floats(V::widen_s16(in.sums + t * in.sums_step + i, lanes)), scale, bias);
      if (kResidual == Residual::potentials || kResidual == Residual::alone) {
        const F32 r = V::floats(V::load(in.residual + t * in.residual_step + i, lanes));
        doubt |= V::above(r, furthest) | V::above(nearest, r);
        h = V::multiply_add(r, residual, h);
      }
      if (kResidual == Residual::codes)
        h = V::multiply_add(V::floats(V::widen_u8(in.codes + t * in.residual_step + i, lanes)), residual, h);
      if (t > 0) {
        if (kTable) {
          v = V::clip(v, first, last);
          const typename V::I32 piece = V::whole(V::multiply_add(v, per, offset));
          h = V::add(h, V::multiply_add(v, slopes(piece), at_zero(piece)));
        } else {
          h = V::multiply_add(v, decay, h);
        }
      }
      const typename V::Mask spike = V::above(h, t == 0 ? above_first : above);
      doubt |= spike ^ V::not_below(h, t == 0 ? below_first : below);
      V::store_spikes(y + t * y_stride + i, spike, lanes);
      if (t + 1 == steps) break;
      v = kReset == Lif::Reset::hard ? V::zero_where(spike, h) : kReset == Lif::Reset::soft ? V::sub_where(spike, h, amount) : h;
    }
    if (doubt) lif_in_doubt<V>(p, in, i, channel, lanes, y, y_stride);
  };
  for (size_t pixel = 0, i = 0; pixel < pixels; ++pixel, i += channels) {
    size_t c = 0;
    for (; c + V::kLanes <= channels; c += V::kLanes) some(i + c, c, V::kLanes);
    if (c < channels) some(i + c, c, static_cast<int>(channels - c));
  }
}

template <class V, bool kTable, Residual kResidual>
void lif_by_reset(const SumsLif& p, const Drives& in, size_t pixels, size_t channels, uint8_t* y, size_t y_stride) {
  using Reset = Lif::Reset;
  const auto run = p.exact.lif.reset == Reset::hard   ? lif_of_sums<V, Reset::hard, kTable, kResidual>
                   : p.exact.lif.reset == Reset::soft ? lif_of_sums<V, Reset::soft, kTable, kResidual>
                                                      : lif_of_sums<V, Reset::none, kTable, kResidual>;
  run(p, in, pixels, channels, y, y_stride);
}

template <class V, bool kTable>
void lif_by_residual(const SumsLif& p, const Drives& in, size_t pixels, size_t channels, uint8_t* y, size_t y_stride) {
  const auto run = !in.sums      ? lif_by_reset<V, kTable, Residual::alone>
                   : in.residual ? lif_by_reset<V, kTable, Residual::potentials>
                   : in.codes    ? lif_by_reset<V, kTable, Residual::codes>
                                 : lif_by_reset<V, kTable, Residual::none>;
  run(p, in, pixels, channels, y, y_stride);
}

template <class V>
void lif_sums(const SumsLif& p, const Drives& in, size_t pixels, size_t channels, uint8_t* y, size_t y_stride) {
  (p.exact.table ? lif_by_residual<V, true> : lif_by_residual<V, false>)(p, in, pixels, channels, y, y_stride);
}

template <class V>
constexpr auto sums_kernel() -> decltype(Kernels::lif_sums) {
  if constexpr (V::kSums) return lif_sums<V>;
  else return nullptr;
}

}  // namespace
}  // namespace bitspike
