// From sums to spikes by rational numbers, and how far those may be trusted: the numbers of lif_sums.h.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"

namespace bitspike {

// The numbers of a SumsLif and their owner. Empty (`get` gives nullptr) where sums may not fit into 16 bits, potentials may
// saturate, or too much would be in doubt.
class LifOfSums {
 public:
  LifOfSums() = default;
  // Of a neuron that reads the potentials of `c`, plus a residual of potentials, or of codes, or none. m and b of `c`, and what `lif`
  // points at, must stay.
  LifOfSums(const Conv& c, const PackedLif& lif, bool residual, const Scaled* codes);
  // Of a neuron that reads potentials, whoever made them.
  explicit LifOfSums(const PackedLif& lif);
  const SumsLif* get() const { return floats_ ? &numbers_ : nullptr; }

 private:
  void prove(const Conv*, const PackedLif&, bool residual, const Scaled* codes);
  std::shared_ptr<std::vector<float>> floats_;
  SumsLif numbers_{};
};

}  // namespace bitspike
