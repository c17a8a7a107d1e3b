// Which variant of a convolution is the cheapest for the density of its input.
#pragma once
#include "kernels.h"

namespace bitspike {

// A variant's time in nanoseconds is
//   product * products + addition * products * density + scan * positions read + output * outputs + call
// with `products` the multiply-accumulates of one image, and `density` the share of its codes that are not 0.
struct Cost {
  float product, addition, scan, output;
};

bool able(const Kernels&, const Conv&, Variant);
// density < 0: not known.
double cost_ns(const Kernels&, const Conv&, Variant, float density);
Variant cheapest(const Kernels&, const Conv&, float density);

}  // namespace bitspike
