// The AVX-512 kernels that every such CPU has; avx512_popcount.cc has the others.
#include "avx512.h"
#include "elementwise.h"

namespace bitspike {

constexpr Kernels kernels_avx512 = kernels<Avx512>("avx512", {popcount_supported_avx512, popcount_packed_bytes_avx512,
                                                              popcount_pack_avx512, popcount_scratch_bytes_avx512,
                                                              conv_popcount_avx512});

}  // namespace bitspike
