// Which variant of a convolution is the cheapest for the density of its input.
#pragma once
#include <array>

#include "kernels.h"

namespace bitspike {

// A variant's time in nanoseconds is
//   product * products + addition * additions * load + scan * reads + output * outputs
// with `products` the multiply-accumulates of one image (for popcount: times the bits of its codes), `load` the mean of
// the input's codes, which is the share of `additions` (as many as products, outputs rounded up to whole vectors) that
// events have to do, and `reads` the codes of all windows.
struct Cost {
  float product, addition, scan, output;
};

bool able(const Kernels&, const Conv&, Variant);
// load < 0: not known.
double cost_ns(const Kernels&, const Conv&, Variant, float load);
Variant cheapest(const Kernels&, const Conv&, const std::array<bool, kVariants>& able, float load);  // dense can do all

}  // namespace bitspike
