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
     {{0.00231f, 0, 0, 0.113f}, {0.00229f, 0, 0, 0.108f}, {0, 0.00463f, 0.051f, 0.270f}, {0.00063f, 0, 0, 0.212f},
      {0.0190f, 0, 0, 0}}},
    {"avx2",
     {{0.00992f, 0, 0, 0.30869f}, {0.01481f, 0, 0, 0.37587f}, {0, 0.00946f, 0.01715f, 0.83213f},
      {0.00350f, 0, 0, 0.57195f}, {0.04033f, 0, 0, 0.20452f}}},
    {"scalar", {{1, 0, 0, 0}, {2, 0, 0, 0}, {0.05f, 1, 1, 0}, {1.5f, 0, 0, 0}, {2, 0, 0, 0}}},
};

constexpr float kUnknown = 1;  // load assumed before the first image

int bits_of(int largest) {
  int bits = 1;
  while (largest >> bits) ++bits;
  return bits;
}

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

double cost_ns(const Kernels& k, const Conv& c, Variant v, float load) {
  const Cost& rate = cost(k, v);
  const double outputs = double(c.out_height) * c.out_width * c.outputs;
  const double taps = double(c.kernel_h) * c.kernel_w * c.group_channels();
  const double products = outputs * taps, read = double(c.out_height) * c.out_width * taps * c.groups;
  const int planes = v == Variant::popcount ? bits_of(c.hi) : 1;
  return rate.product * products * planes + rate.addition * products * (load < 0 ? kUnknown : load) + rate.scan * read +
         rate.output * outputs;
}

Variant cheapest(const Kernels& k, const Conv& c, float load) {
  Variant best = Variant::dense;
  for (int i = 1; i < kVariants; ++i) {
    const Variant v = static_cast<Variant>(i);
    if (able(k, c, v) && cost_ns(k, c, v, load) < cost_ns(k, c, best, load)) best = v;
  }
  return best;
}

}  // namespace bitspike
