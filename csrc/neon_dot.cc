// NEON with the dot product of ARMv8.2.
#include "neon.h"

namespace bitspike {
namespace {

constexpr ConvKernel kPopcount = {popcount_supported, popcount_packed_bytes<Neon<true>>, popcount_pack<Neon<true>>,
                                  popcount_scratch_bytes<Neon<true>>, conv_popcount<Neon<true>>};

}  // namespace

constexpr Kernels kernels_neon_dot = kernels<Neon<true>>("neon_dot", kPopcount);

}  // namespace bitspike
