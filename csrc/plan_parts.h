// What a plan keeps of a convolution: for plan.cc and plan_ops.cc.
#pragma once
#include <atomic>
#include <optional>

#include "direct.h"
#include "lif_of_sums.h"
#include "plan.h"

namespace bitspike {

struct Plan::Layered {
  Conv conv;
  int stage, input, residual;
  Scaled scaled;  // of a residual of codes
  int out = -1;  // its potentials, if they are all it writes and live in a tile
  int forced = -1;
  std::optional<Codes> only;  // all that its epilogue writes
  DirectCodes direct;
  std::atomic<const Direct*> direct_ready{nullptr};
  LifOfSums sums;  // of the one neuron that reads `out`, which then holds sums: 16 bits each, where a step's potentials would begin
  std::array<bool, kVariants> able{};
  std::atomic<bool> by_bits{false};
  bool choice;  // more than one variant is able
  std::array<Memory, kVariants> packed;
  std::array<std::atomic<bool>, kVariants> ready{};
};

}  // namespace bitspike
