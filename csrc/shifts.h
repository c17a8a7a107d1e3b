// Convolution with weights 0 and +-2^e as shifts and additions, no products. With s = -1 for a negative weight, else 0:
//
//   w * x = ((x << e) ^ s) - s
//
// so acc += (x << e) ^ s, and the sum of -s, known in advance, is where the accumulator starts. The shift instructions give
// 0 for a shift of 32 or more, which is what a zero weight asks for.
#pragma once
#include "tiles.h"

namespace bitspike {
namespace {

template <class V>
struct ShiftOf : V {
  using Code = int32_t;
  using Weight = int32_t;  // e in the low 6 bits, the sign in the top one
  static constexpr int kUnit = 1, kVectors = 2, kSignedOffset = 0, kUnsignedOffset = 0;

  static void put_weight(int32_t* at, int, int8_t w) {
    int32_t e = 0;
    while (1 << e < (w < 0 ? -w : w)) ++e;
    *at = w == 0 ? 32 : w < 0 ? e | INT32_MIN : e;
  }
  static uint32_t start(int8_t w, int32_t) { return w < 0; }
  static typename V::I32 load_weights(const int32_t* p) { return V::load(p); }
  static typename V::I32 broadcast(const int32_t* p) { return V::splat(*p); }
  static typename V::I32 dot(typename V::I32 acc, typename V::I32 code, typename V::I32 weight) {
    const typename V::I32 e = V::and_(weight, V::splat(63)), sign = V::shift_right(weight, 31);
    return V::add(acc, V::xor_(V::shift_left_each(code, e), sign));
  }
  static void convert(int32_t* to, const uint8_t* from, size_t n, bool is_signed) {
    const int8_t* from_signed = reinterpret_cast<const int8_t*>(from);
    if (is_signed)
      for (size_t i = 0; i < n; ++i) to[i] = from_signed[i];
    else
      for (size_t i = 0; i < n; ++i) to[i] = from[i];
  }
  static const int32_t* in_place(const Conv&, const uint8_t*, int, int) { return nullptr; }
};

}  // namespace
}  // namespace bitspike
