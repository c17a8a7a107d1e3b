// The AVX-512 kernel that needs vpopcntd: 512 bits of AND, count and add in three instructions.
#include "avx512.h"
#include "bits.h"
#include "maps.h"
#include "spin.h"

namespace bitspike {
namespace {

struct Avx512Bits : Avx512 {
  static I32 count_and(I32 acc, I32 codes, I32 weights) {
    return _mm512_add_epi32(acc, _mm512_popcnt_epi32(_mm512_and_si512(codes, weights)));
  }
};

}  // namespace

constexpr MapKernel maps_popcount_avx512 = map_kernel<Avx512Bits>();

double spin_popcount_avx512(size_t rounds) {
  using I32 = Avx512::I32;
  return spin_on<Avx512Bits>(rounds, 32 * Avx512::kLanes,
                             [](I32 acc, I32 x) { return Avx512Bits::count_and(acc, x, Avx512::opaque(x)); });
}

bool popcount_supported_avx512(const Conv& c) { return popcount_supported(c) && cpu_has_avx512_popcount(); }
size_t popcount_packed_bytes_avx512(const Conv& c) { return popcount_packed_bytes<Avx512Bits>(c); }
void popcount_pack_avx512(const Conv& c, void* packed) { popcount_pack<Avx512Bits>(c, packed); }
size_t popcount_scratch_bytes_avx512(const Conv& c, int rows) { return popcount_scratch_bytes<Avx512Bits>(c, rows); }
void conv_popcount_avx512(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                          void* scratch) {
  conv_popcount<Avx512Bits>(c, packed, image, row0, row1, e, scratch);
}

}  // namespace bitspike
