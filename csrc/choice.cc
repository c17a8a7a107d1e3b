#include "choice.h"

#include <cstring>

namespace bitspike {
namespace {

// By Variant: dense, narrow, events, popcount, shift. Measured on one core per instruction set by
// `python benchmarks/choice.py`, which prints these lines; only their ratios matter.
// avx512's popcount is an exception: fitted on 8 x 8 and 16 x 16 layers of 256 to 1536 channels, since in networks of that
// size events, whose weights are 8 times as large, were chosen where popcount took 0.4 to 0.9 of their time.
struct Costs {
  const char* name;
  int added;  // outputs that an addition of events makes at once, whether there are so many or not
  Cost of[kVariants];
};

constexpr Costs kCosts[] = {
    {"avx512", 128,
     {{0.00223f, 0, 0, 0.120f}, {0.00221f, 0, 0, 0.113f}, {0, 0.00265f, 0.041f, 0.258f}, {0.00041f, 0, 0, 0.140f},
      {0.0179f, 0, 0, 0.038f}}},
    {"avx2", 1,
     {{0.00971f, 0, 0, 0.331f}, {0.01449f, 0, 0, 0.397f}, {0, 0.00869f, 0.047f, 0.589f}, {0.00353f, 0, 0, 0.602f},
      {0.0390f, 0, 0, 0.300f}}},
    {"scalar", 1, {{1, 0, 0, 0}, {2, 0, 0, 0}, {0.05f, 1, 1, 0}, {1.5f, 0, 0, 0}, {2, 0, 0, 0}}},
};

constexpr float kUnknown = 1;  // load assumed before the first image

const Costs& costs(const Kernels& k) {
  for (const Costs& c : kCosts)
    if (std::strcmp(c.name, k.name) == 0) return c;
  return kCosts[0];
}

}  // namespace

bool able(const Kernels& k, const Conv& c, Variant v) {
  const ConvKernel& kernel = k.conv[static_cast<int>(v)];
  return kernel.run && (!kernel.supported || kernel.supported(c));
}

double cost_ns(const Kernels& k, const Conv& c, Variant v, float load) {
  const Costs& all = costs(k);
  const Cost& rate = all.of[static_cast<int>(v)];
  const double outputs = double(c.out_height) * c.out_width * c.outputs;
  const double taps = double(c.kernel_h) * c.kernel_w * c.group_channels();
  const double products = outputs * taps, read = double(c.out_height) * c.out_width * taps * c.groups;
  const int planes = v == Variant::popcount ? c.bit_planes() : 1;
  const int added = std::strcmp(all.name, k.name) == 0 ? all.added : 1;  // of another set only the ratios are borrowed
  const double additions = products / c.outputs * ((c.outputs + added - 1) / added * added);
  return rate.product * products * planes + rate.addition * additions * (load < 0 ? kUnknown : load) + rate.scan * read +
         rate.output * outputs;
}

Variant cheapest(const Kernels& k, const Conv& c, const std::array<bool, kVariants>& able, float load) {
  Variant best = Variant::dense;
  double least = cost_ns(k, c, best, load);
  for (int i = 1; i < kVariants; ++i) {
    const Variant v = static_cast<Variant>(i);
    const double ns = able[i] ? cost_ns(k, c, v, load) : least;
    if (ns < least) best = v, least = ns;
  }
  return best;
}

}  // namespace bitspike
