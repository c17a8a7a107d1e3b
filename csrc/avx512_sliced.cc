// AVX-512 kernels with byte permutations and bit matrices (VBMI, GFNI): rows of bits, whose planes become numbers eight at a time, and
// tables of bytes.
#include "avx512.h"
#include "sliced.h"

namespace bitspike {
namespace {

struct Avx512Sliced : Avx512 {
  // Planes 0 to 7 of 64 outputs are eight matrices of 8 x 8 bits, a row a plane; transposed, a row is a number. The permutation
  // gathers a matrix into 64 bits, plane 7 first as the instruction wants it, and the matrices of the outputs from 32 on between those
  // of the others, so that unpacking puts all in order.
  template <size_t kStep>
  static void count_planes(const uint8_t* from, int planes, I32* count) {
    I32 pairs[2];
    count_pairs<kStep>(from, planes, pairs);
    widen_u16(pairs[0], count);
    widen_u16(pairs[1], count + 2);
  }
  // In 16 bits.
  template <size_t kStep>
  static void count_pairs(const uint8_t* from, int planes, I32* pairs) {
    static_assert(kStep == 16, "planes of a lane");
    alignas(64) static constexpr uint8_t kMatrices[64] = {
        112, 96, 80, 64, 48, 32, 16, 0, 116, 100, 84, 68, 52, 36, 20, 4, 113, 97, 81, 65, 49, 33, 17, 1, 117, 101, 85, 69, 53, 37, 21, 5,
        114, 98, 82, 66, 50, 34, 18, 2, 118, 102, 86, 70, 54, 38, 22, 6, 115, 99, 83, 67, 51, 35, 19, 3, 119, 103, 87, 71, 55, 39, 23, 7};
    const __m512i matrices = _mm512_load_si512(kMatrices), unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    const auto bytes = [&](const uint8_t* at, int rows) {  // plane p is byte 7 - p
      const __mmask64 there = 0x0101010101010101u * ((0xff00u >> rows) & 0xffu);
      const __m512i m = _mm512_maskz_permutex2var_epi8(rows >= 8 ? ~uint64_t{0} : there, _mm512_loadu_si512(at), matrices,
                                                       _mm512_loadu_si512(at + 64));
      return _mm512_gf2p8affine_epi64_epi8(unit, m, 0);
    };
    const __m512i low = bytes(from, planes), high = planes > 8 ? bytes(from + 8 * kStep, planes - 8) : zero();
    pairs[0] = _mm512_unpacklo_epi8(low, high);
    pairs[1] = _mm512_unpackhi_epi8(low, high);
  }
};

}  // namespace

void conv_sliced_avx512(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                        void* scratch) {
  conv_sliced<Avx512Sliced>(c, packed, image, row0, row1, e, scratch);
}

// A table of 256 bytes is four registers; those of all channels are asked, and every byte takes the answer of its own.
void lookup_avx512(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y) {
  __m512i tables[kMostTables][4];
  uint64_t own[kMostTables][kMostTables] = {};  // [phase][channel]: which bytes of a vector that begins with channel `phase` are its
  for (size_t c = 0; c < channels; ++c) {
    for (int i = 0; i < 4; ++i) tables[c][i] = _mm512_loadu_si512(table + c * 256 + i * 64);
    for (size_t phase = 0; phase < channels; ++phase)
      for (size_t i = 0; i < 64; ++i) own[phase][c] |= static_cast<uint64_t>((phase + i) % channels == c) << i;
  }
  const size_t count = rows * channels;
  size_t phase = 0;
  for (size_t i = 0; i < count; i += 64, phase = (phase + 64) % channels) {
    const uint64_t there = count - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (count - i)) - 1;
    const __m512i codes = _mm512_maskz_loadu_epi8(there, x + i);
    const uint64_t upper = _mm512_movepi8_mask(codes);
    __m512i found = _mm512_setzero_si512();
    for (size_t c = 0; c < channels; ++c) {
      const __m512i low = _mm512_permutex2var_epi8(tables[c][0], codes, tables[c][1]);
      const __m512i high = _mm512_permutex2var_epi8(tables[c][2], codes, tables[c][3]);
      found = _mm512_mask_mov_epi8(found, own[phase][c], _mm512_mask_mov_epi8(low, upper, high));
    }
    _mm512_mask_storeu_epi8(y + i, there, found);
  }
}

}  // namespace bitspike
