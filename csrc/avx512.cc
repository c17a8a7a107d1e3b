// The AVX-512 kernels that every such CPU has; avx512_popcount.cc has the others.
#include "avx512.h"
#include "elementwise.h"

namespace bitspike {
namespace {

// Maps count bits faster where there is vpopcntd.
void attention_map_best(const Heads& s, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1,
                        int32_t m, int shift, int32_t* y, void* scratch) {
  const auto run = cpu_has_avx512_popcount() ? maps_popcount_avx512.map : attention_map<Avx512>;
  run(s, over_channels, a, b, row0, row1, m, shift, y, scratch);
}

void attention_read_best(const Heads& s, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first,
                         size_t count, const int32_t* m, int shift, int32_t* y, void* scratch) {
  const auto run = cpu_has_avx512_popcount() ? maps_popcount_avx512.read : attention_read<Avx512>;
  run(s, over_tokens, chosen, x, first, count, m, shift, y, scratch);
}

void conv_sliced_best(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
  const auto run = cpu_has_avx512_matrices() ? conv_sliced_avx512 : conv_sliced<Avx512>;
  run(c, packed, image, row0, row1, e, scratch);
}

void lookup_best(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y) {
  (channels <= kMostTables && cpu_has_avx512_matrices() ? lookup_avx512 : scalar_lookup)(x, rows, channels, table, y);
}

constexpr ConvKernel sliced_best() {
  ConvKernel kernel = sliced_kernel<Avx512>();
  kernel.run = conv_sliced_best;
  return kernel;
}

}  // namespace

constexpr Kernels kernels_avx512 = kernels<Avx512>("avx512", {popcount_supported_avx512, popcount_packed_bytes_avx512,
                                                              popcount_pack_avx512, popcount_scratch_bytes_avx512,
                                                              conv_popcount_avx512},
                                                   sliced_best(),
                                                   {attention_map_scratch_bytes<Avx512>, attention_map_best,
                                                    attention_read_scratch_bytes<Avx512>, attention_read_best},
                                                   lookup_best);

}  // namespace bitspike
