#include "choice.h"

#include <cstring>

namespace bitspike {
namespace {

// By Variant: dense, narrow, events, sliced, popcount, shift, winograd, matrix. Measured on one core per instruction set by
// `python benchmarks/choice.py`, which prints these lines; only their ratios matter. Some are set by hand. An output of narrow on AVX-512
// costs as much as one of dense (measured: 0.107), since weights that come from far, as in a network of many layers and not in that
// benchmark, are half as many; the 1x1 layers of the 15 M network take 0.97 x the time so. Beside matrix (measured: 0.00040, 0.013, 0.063) sliced
// costs 0.8 x what was measured, and weights of matrix come from far: neurons over time, which the benchmark lacks, go well with it, and
// with what was measured BESTformer takes 1.3 x and Q-SNN 1.1 x the time.
struct Costs {
  const char* name;
  int added;   // outputs that an addition of events makes at once, whether there are so many or not
  int sliced;  // the same for a row of bits
  Cost of[kVariants];
};

constexpr Costs kCosts[] = {
    {"avx512", 128, 512,
     {{0.00215f, 0, 0, 0.093f}, {0.00211f, 0, 0, 0.093f}, {0, 0.00257f, 0.032f, 0.241f}, {0, 0.00071f, 0.013f, 0.159f},
      {0.00048f, 0, 0, 0.154f}, {0.0145f, 0, 0, 0.097f}, {0.00235f, 0, 0, 0.256f}, {}}},
    {"amx", 128, 512,  // on Intel, 512-bit instructions one or two a cycle
     {{0.00250f, 0, 0, 0.103f}, {0.00283f, 0, 0, 0.123f}, {0, 0.00381f, 0.029f, 0.274f}, {0, 0.00069f, 0.013f, 0.202f},
      {0.00077f, 0, 0, 0.17f}, {0.0287f, 0, 0, 0.146f}, {0.00355f, 0, 0, 0.192f}, {0.00041f, 0, 0.056f, 0.030f}}},
    {"avx2", 1, 256,
     {{0.00949f, 0, 0, 0.226f}, {0.0142f, 0, 0, 0.296f}, {0, 0.00790f, 0.040f, 0.567f}, {0, 0.00284f, 0.027f, 0.996f},
      {0.00324f, 0, 0, 0.578f}, {0.0308f, 0, 0, 0.258f}, {0.00995f, 0, 0, 0.218f}}},
    {"scalar", 1, 1, {{1, 0, 0, 0}, {2, 0, 0, 0}, {0.05f, 1, 1, 0}, {0.05f, 1.1f, 1, 0}, {1.5f, 0, 0, 0}, {2, 0, 0, 0}, {3, 0, 0, 0}}},
};

constexpr float kUnknown = 1;  // load assumed before the first image
// What the lists of a window cost that it has for bits instead of one, in additions. Measured on the 15 M network, where that is 1.1 x the
// time if codes beyond 1 are rare.
constexpr float kPlanes = 30;

const Costs& costs(const Kernels& k) {
  for (const Costs& c : kCosts)
    if (std::strcmp(c.name, k.name) == 0) return c;
  return kCosts[0];
}

}  // namespace

bool by_bits(const Kernels& k, const Conv& c, Load codes) {
  if (!k.carry_save || c.hi <= 1) return false;
  const Conv wide = events_conv(c, k.event_bytes, k.carry_save);
  const float rows = static_cast<float>(wide.kernel_h) * wide.kernel_w * wide.group_channels();
  return rows_of_nibbles(wide, k.event_bytes) && codes.bits + kPlanes / rows < codes.mean;
}

bool able(const Kernels& k, const Conv& c, Variant v) {
  const ConvKernel& kernel = k.conv[static_cast<int>(v)];
  return kernel.run && (!kernel.supported || kernel.supported(c));
}

double cost_ns(const Kernels& k, const Conv& conv, Variant v, Load codes) {
  const Costs& all = costs(k);
  const Cost& rate = all.of[static_cast<int>(v)];
  const Conv c = v == Variant::events ? events_conv(conv, k.event_bytes, k.carry_save) : conv;
  const double outputs = double(c.out_height) * c.out_width * c.outputs;
  const double taps = double(c.kernel_h) * c.kernel_w * c.group_channels();
  // Winograd: 16 for every tile of 2x2 outputs, 24 for one of 2x4.
  const double tiles = double((c.out_height + 1) / 2) * (c.wide_tiles ? (c.out_width + 3) / 4 * 24 : (c.out_width + 1) / 2 * 16);
  // Whole tiles of 16 pixels, 64 codes and two times 16 outputs.
  const auto whole = [](double n, int unit) { return (int64_t(n) + unit - 1) / unit * double(unit); };
  const double weights = c.kernel_h * whole(double(c.kernel_w) * c.channels, 64) * whole(c.outputs, 32);
  const double matrices = whole(double(c.out_height) * c.out_width, 16) * weights;
  const bool matrix = v == Variant::matrix;
  const double products = v == Variant::winograd ? tiles * c.outputs * c.channels : matrix ? matrices : outputs * taps;
  const double read = matrix ? weights : double(c.out_height) * c.out_width * taps * c.groups;
  const int planes = v == Variant::popcount ? c.bit_planes() : 1;
  const bool own = std::strcmp(all.name, k.name) == 0;  // of another set only the ratios are borrowed
  const bool sliced = v == Variant::sliced;
  const int added = sliced ? own ? all.sliced : 128 : own ? all.added : 1;
  double additions = products / c.outputs * ((c.outputs + added - 1) / added * added);
  if (sliced && sliced_across(c, added))  // one row of bits for all taps of a row
    additions = products / c.outputs / c.kernel_w * ((4 * c.outputs + added - 1) / added * added);
  const float load = v == Variant::events && by_bits(k, conv, codes) ? codes.bits : codes.mean;
  return rate.product * products * planes + rate.addition * additions * (load < 0 ? kUnknown : load) + rate.scan * read +
         rate.output * outputs;
}

Variant cheapest(const Kernels& k, const Conv& c, const std::array<bool, kVariants>& able, Load load) {
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
