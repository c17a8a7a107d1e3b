// NEON of every 64-bit ARM processor.
#include "neon.h"

namespace bitspike {

constexpr Kernels kernels_neon = kernels<Neon<false>>("neon", popcount_kernel<Neon<false>>());

}  // namespace bitspike
