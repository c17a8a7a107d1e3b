// NEON with the dot product of ARMv8.2.
#include "neon.h"

namespace bitspike {

constexpr Kernels kernels_neon_dot = kernels<Neon<true>>("neon_dot", popcount_kernel<Neon<true>>());

}  // namespace bitspike
