// What becomes of the sums that a matrix unit makes, a pixel at a time: epilogues over 64 or 32 outputs, in vectors (see amx.cc).
#pragma once
#include <utility>

#include "amx_slots.h"

namespace bitspike {
namespace {

// What becomes of 16 * kTiles sums of a pixel, or of those of the outputs that there are. Codes straight from sums, by floats (see Direct):
template <class Finish, int kTiles>
struct RoundedPixel {
  static constexpr int kOutputs = kTiles * kRows;
  static constexpr bool kCounts = true;
  FloatCodes<Avx512, kTiles, Finish::kMade == Made::twice> codes;
  Bytes bytes;
  RoundedPixel(const Conv& c, const MatrixPacking&, const Finish& write, int first)
      : codes(write.direct, first), bytes(write.direct.lo, write.direct.hi, c.outputs - first) {}
  BITSPIKE_INLINE void operator()(const Finish& write, const int32_t* sums, size_t at, int, size_t& nonzero) const {
    __m512i code[kTiles];
    for (int n = 0; n < kTiles; ++n) code[n] = codes(n, _mm512_loadu_si512(sums + n * kRows));
    bytes.put(code, write.codes + at, nonzero);
  }
};

// How many of 16 outputs there are from one on.
inline int lanes_left(int left) { return left < 0 ? 0 : at_most(left, kRows); }

// Codes of potentials, which may be kept, too. The bits of a product from the shift on, of which 32 are wanted, are picked byte by byte, those of
// odd outputs between those of even ones: one instruction each. They must lie in 64 bits, so shifts may be up to 32.
constexpr int kMostShift = 32;

template <class Finish, int kTiles>
struct PotentialsPixel {
  static constexpr int kOutputs = kTiles * kRows;
  static constexpr bool kCounts = true;
  Avx512::Factor m[kTiles];
  Avx512::Factor b[kTiles];  // plus what rounds, where products have them
  __m512i from;
  Bytes bytes;
  int lanes[kTiles];
  PotentialsPixel(const Conv& c, const MatrixPacking& p, const Finish& write, int first)
      : PotentialsPixel(c, p, write, first, std::make_integer_sequence<int, kTiles>()) {}
  BITSPIKE_INLINE void operator()(const Finish& write, const int32_t* sums, size_t at, int first, size_t& nonzero) const {
    __m512i code[kTiles];
    for (int n = 0; n < kTiles; ++n) {
      const __mmask16 there = static_cast<__mmask16>(bytes.there >> n * kRows);
      const __m512i even = _mm512_add_epi64(_mm512_mul_epi32(_mm512_loadu_si512(sums + n * kRows), m[n].even), b[n].even);
      // Odd ones by a unit that does not multiply, and that tiles leave alone.
      const __m512i odds = _mm512_castps_si512(_mm512_movehdup_ps(_mm512_loadu_ps(sums + n * kRows)));
      const __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(odds, m[n].odd), b[n].odd);
      __m512i x = _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(from, even), 0xf0f0f0f0f0f0f0f0u, from, odd);
      if constexpr (Finish::kSum != Added::nothing) {
        const __m512i residual = _mm512_maskz_loadu_epi32(there, write.residual + at + n * kRows);
        x = Finish::kSum == Added::fitting ? Avx512::add(x, residual) : Avx512::add_saturating(x, residual);
      }
      if constexpr (Finish::kKept) _mm512_mask_storeu_epi32(write.out + at + n * kRows, there, x);
      code[n] = write.code(first + n * kRows, lanes[n], x);
    }
    bytes.put(code, write.codes + at, nonzero);
  }

 private:
  // Modulo 2^64, of which 32 bits from the shift on are wanted.
  static Avx512::Factor bias(const Conv& c, const int32_t* b_at) {
    const Avx512::Scale scale(c.shift);
    Avx512::Factor b(b_at);
    for (__m512i* part : {&b.even, &b.odd}) *part = _mm512_add_epi64(_mm512_sll_epi64(*part, scale.shift), scale.half);
    return b;
  }
  template <int... kN>
  PotentialsPixel(const Conv& c, const MatrixPacking& p, const Finish& write, int first, std::integer_sequence<int, kN...>)
      : m{Avx512::multiplier(p.m + first + kN * kRows)...}, b{bias(c, p.b + first + kN * kRows)...},
        from(_mm512_set1_epi32(0x18100800 + 0x01010101 * c.shift)),
        bytes(write.lo(), write.hi(), c.outputs - first), lanes{lanes_left(c.outputs - first - kN * kRows)...} {}
};

// Any epilogue: kTiles vectors.
template <class Finish, int kTiles>
struct Vectors {
  static constexpr int kOutputs = kTiles * kRows;
  static constexpr bool kCounts = false;
  Vectors<Finish, kTiles - 1> before;
  Requantize<Avx512, Finish> last;
  Avx512::Scale scale;
  int lanes;
  Vectors(const Conv& c, const MatrixPacking& p, const Finish& write, int first)
      : before(c, p, write, first), last(write, first + kOutputs - kRows, p.m + first + kOutputs - kRows, p.b + first + kOutputs - kRows),
        scale(c.shift), lanes(lanes_left(c.outputs - first - kOutputs + kRows)) {}
  BITSPIKE_INLINE void operator()(const Finish& write, const int32_t* sums, size_t at, int first, size_t& nonzero) const {
    constexpr int kFrom = kOutputs - kRows;
    before(write, sums, at, first, nonzero);
    if (lanes == kRows) write(at + kFrom, first + kFrom, kRows, last(Avx512::load(sums + kFrom), scale));
    else if (lanes) write(at + kFrom, first + kFrom, lanes, last(Avx512::load(sums + kFrom), scale));
  }
};
template <class Finish>
struct Vectors<Finish, 0> {
  Vectors(const Conv&, const MatrixPacking&, const Finish&, int) {}
  BITSPIKE_INLINE void operator()(const Finish&, const int32_t*, size_t, int, size_t&) const {}
};

// How a pixel is finished. kFew: shifts up to kMostShift.
template <class Finish, int kTiles, bool kFew>
using PixelOf = std::conditional_t<by_floats(Finish::kMade), RoundedPixel<Finish, kTiles>,
                                   std::conditional_t<Finish::kUsualCodes && kFew, PotentialsPixel<Finish, kTiles>, Vectors<Finish, kTiles>>>;

}  // namespace
}  // namespace bitspike
