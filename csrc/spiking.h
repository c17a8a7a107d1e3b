// Ops on spikes that need no instruction set of their own. Plain loops for the compiler's vectorizer; docs/format.md has the
// definitions.
#pragma once
#include "kernels.h"

namespace bitspike {

// y[c] = sat32(rshift(m * sum over positions of k v, s)); the sum is below 2^31.
void coincidences(const uint8_t* k, const uint8_t* v, size_t positions, size_t channels, int32_t m, int shift, int32_t* y);
void add_codes(const uint8_t* a, const uint8_t* b, size_t count, uint8_t* y);
// y = q * chosen[channel]
void mask_codes(const uint8_t* q, const uint8_t* chosen, size_t positions, size_t channels, uint8_t* y);

}  // namespace bitspike
