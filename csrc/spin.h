// The machine's bound: the instruction that a variant cannot do without, on registers alone, as often as it goes.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// Step: (accumulator, x) -> accumulator, `per_step` multiply-accumulates each. 12 independent accumulators hide latency.
template <class V, class Step>
double spin_on(size_t rounds, double per_step, Step step) {
  typename V::I32 acc[12], x = V::splat(static_cast<int32_t>(rounds));
  for (int i = 0; i < 12; ++i) acc[i] = V::zero();
  for (size_t r = 0; r < rounds; ++r)
    for (int i = 0; i < 12; ++i) acc[i] = step(acc[i], x);
  for (int i = 1; i < 12; ++i) acc[0] = V::add(acc[0], acc[i]);
  int32_t sink[V::kLanes];
  V::store(sink, acc[0], V::kLanes);
  volatile int32_t used = sink[0];  // so that none of it is optimized away
  (void)used;
  return static_cast<double>(rounds) * 12 * per_step;
}

template <class V>
double spin(Spin what, size_t rounds) {
  using I32 = typename V::I32;
  if (what == Spin::dot)
    return spin_on<V>(rounds, V::kLanes * V::kUnit, [](I32 acc, I32 x) { return V::dot(acc, x, x); });
  if (what == Spin::add)
    return spin_on<V>(rounds, V::kBytes, [](I32 acc, I32 x) { return V::add8(acc, V::opaque(x)); });
  if (what == Spin::carry)  // a row of bits each
    return spin_on<V>(rounds, 8 * V::kBytes, [](I32 acc, I32 x) { return V::parity(acc, V::majority(acc, x, V::opaque(x)), x); });
  return what == Spin::popcount ? V::spin_popcount(rounds) : 0;
}

}  // namespace
}  // namespace bitspike
