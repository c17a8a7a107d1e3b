// NEON of every 64-bit ARM processor.
#include "neon.h"

namespace bitspike {
namespace {

constexpr ConvKernel kPopcount = {popcount_supported, popcount_packed_bytes<Neon<false>>, popcount_pack<Neon<false>>,
                                  popcount_scratch_bytes<Neon<false>>, conv_popcount<Neon<false>>};

}  // namespace

constexpr Kernels kernels_neon = kernels<Neon<false>>("neon", kPopcount);

}  // namespace bitspike
