// From a sum to a code in one multiplication of 32 bits, or in floats, where two multiplications of 64 bits, each with a rounding, define it.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"

namespace bitspike {

// The numbers of a Direct and their owner. Empty (`get` gives nullptr) where nothing of the kind does.
class DirectCodes {
 public:
  DirectCodes() = default;
  // From the sums of `c` to the codes of `q`, with nothing between them.
  DirectCodes(const Conv& c, const Quantizer& q);
  const Direct* get() const { return numbers_ ? &direct_ : nullptr; }

 private:
  struct Numbers {
    std::vector<int32_t> whole;
    std::vector<float> floats;
  };
  std::shared_ptr<Numbers> numbers_;
  Direct direct_{};
};

}  // namespace bitspike
