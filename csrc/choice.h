// Which variant of a convolution is the cheapest for the density of its input.
#pragma once
#include <array>

#include "kernels.h"

namespace bitspike {

// A variant's time in nanoseconds is
//   product * products + addition * additions * load + scan * reads + output * outputs
// with `products` the multiply-accumulates of one image (for popcount: times the bits of its codes), `load` the share of `additions` (as
// many as products, outputs rounded up to whole vectors) that events have to do, and `reads` the codes of all windows, or, for matrix, the
// weights.
struct Cost {
  float product, addition, scan, output;
};

// Of the codes of an input: their mean, and how many of their bits are set. A code that is added as often as it says is a load of `mean`,
// one that is added bit by bit a load of `bits`. Negative: not known.
struct Load {
  float mean = -1, bits = -1;
};

// Whether events of such codes are fewer bit by bit, all in all.
bool by_bits(const Kernels&, const Conv&, Load);
bool able(const Kernels&, const Conv&, Variant);
double cost_ns(const Kernels&, const Conv&, Variant, Load);
Variant cheapest(const Kernels&, const Conv&, const std::array<bool, kVariants>& able, Load);  // dense can do all

}  // namespace bitspike
