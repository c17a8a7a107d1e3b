#include "choice.h"

#include <cstring>

namespace bitspike {
namespace {

// By Variant: dense, narrow, events, popcount, shift. Measured on one core per instruction set by
// `python benchmarks/choice.py`, which prints these lines; only their ratios matter.
struct Costs {
  const char* name;
  Cost of[kVariants];
};

constexpr Costs kCosts[] = {
    {"avx512",
     {{0.0026f, 0, 0, 0.05f}, {0.0030f, 0, 0, 0.05f}, {0.0001f, 0.0075f, 0.02f, 0.05f}, {0.0020f, 0, 0, 0.05f},
      {0.0200f, 0, 0, 0.05f}}},
    {"avx2",
     {{0.0090f, 0, 0, 0.1f}, {0.0100f, 0, 0, 0.1f}, {0.0002f, 0.0150f, 0.04f, 0.1f}, {0.0080f, 0, 0, 0.1f},
      {0.0300f, 0, 0, 0.1f}}},
    {"scalar", {{1, 0, 0, 0}, {2, 0, 0, 0}, {0.05f, 1, 1, 0}, {1.5f, 0, 0, 0}, {2, 0, 0, 0}}},
};

constexpr float kUnknown = 0.5f;  // density assumed before the first image

const Cost& cost(const Kernels& k, Variant v) {
  for (const Costs& c : kCosts)
    if (std::strcmp(c.name, k.name) == 0) return c.of[static_cast<int>(v)];
  return kCosts[0].of[static_cast<int>(v)];
}

}  // namespace

bool able(const Kernels& k, const Conv& c, Variant v) {
  const ConvKernel& kernel = k.conv[static_cast<int>(v)];
  return kernel.run && (!kernel.supported || kernel.supported(c));
}

double cost_ns(const Kernels& k, const Conv& c, Variant v, float density) {
  const Cost& rate = cost(k, v);
  const double outputs = double(c.out_height) * c.out_width * c.outputs;
  const double taps = double(c.kernel_h) * c.kernel_w * c.group_channels();
  const double products = outputs * taps, read = double(c.out_height) * c.out_width * taps * c.groups;
  return rate.product * products + rate.addition * products * (density < 0 ? kUnknown : density) + rate.scan * read +
         rate.output * outputs;
}

Variant cheapest(const Kernels& k, const Conv& c, float density) {
  Variant best = Variant::dense;
  for (int i = 1; i < kVariants; ++i) {
    const Variant v = static_cast<Variant>(i);
    if (able(k, c, v) && cost_ns(k, c, v, density) < cost_ns(k, c, best, density)) best = v;
  }
  return best;
}

}  // namespace bitspike
