// What the files that talk to Python share: checks of arguments.
#pragma once
#include <nanobind/nanobind.h>

#include <string>
#include <utility>

#include "kernels.h"

namespace bitspike {

using Pair = std::pair<int, int>;

inline void require(bool ok, const char* what) {
  if (!ok) throw nanobind::value_error(what);
}

inline const Kernels& kernels_named(const std::string& isa) {
  const Kernels* k = find_kernels(isa.c_str());
  if (!k) throw nanobind::value_error(("no kernels '" + isa + "' in this build or for this CPU").c_str());
  return *k;
}

inline void check_shift(int s) { require(s >= 0 && s <= 62, "shifts must be 0..62"); }

inline Lif lif_of(Pair decay, Pair gain, int threshold, const std::string& reset, bool strict, int steps) {
  require(reset == "hard" || reset == "soft" || reset == "none", "reset must be 'hard', 'soft' or 'none'");
  check_shift(decay.second);
  check_shift(gain.second);
  Lif p{};
  p.decay_m = decay.first, p.gain_m = gain.first, p.threshold = threshold, p.decay_s = decay.second;
  p.gain_s = gain.second, p.strict = strict, p.steps = steps;
  p.reset = reset == "hard" ? Lif::Reset::hard : reset == "soft" ? Lif::Reset::soft : Lif::Reset::none;
  return p;
}

}  // namespace bitspike
