// Adding up rows of weights bit by bit, for sliced.h (a bit an output) and events.h (4 bits an output): full adders take three rows and
// give two, a sum and what is carried, without regard to what the bits belong to.
#pragma once
#include "event_lists.h"

namespace bitspike {
namespace {

// The rows of a group. Two words are read in place of eight entries: beside the rows themselves, loads are what there is least of.
inline void group_rows(const uint16_t* list, size_t* row) {
  uint64_t words[2];
  memcpy(words, list, sizeof words);
  for (size_t i = 0; i < kGroup; ++i) row[i] = words[i / 4] >> 16 * (i % 4) & 0xffff;
}

// Planes live in registers, so what works on them must not become a call.
// a + b + c as a sum, and what is carried.
template <class V>
BITSPIKE_INLINE typename V::I32 full_adder(typename V::I32 a, typename V::I32 b, typename V::I32 c, typename V::I32& carry) {
  carry = V::majority(a, b, c);
  return V::parity(a, b, c);
}

// Eight rows, kRowBytes from one to the next, into planes 0, 1 and 2; returns what is carried. The planes come in last, so that groups
// wait for one adder only.
template <class V, size_t kRowBytes>
BITSPIKE_INLINE typename V::I32 add_group(const uint8_t* weight, const uint16_t* list, typename V::I32* plane) {
  using I32 = typename V::I32;
  constexpr size_t kScale = kRowBytes / kEventEntry;
  size_t from[kGroup];
  group_rows(list, from);
  const auto row = [&](int i) { return V::load_bytes(reinterpret_cast<const int8_t*>(weight + from[i] * kScale)); };
  I32 twos[4], fours[2], eights;
  const I32 ones0 = full_adder<V>(row(0), row(1), row(2), twos[0]), ones1 = full_adder<V>(row(3), row(4), row(5), twos[1]);
  const I32 ones2 = full_adder<V>(row(6), row(7), ones0, twos[2]);
  plane[0] = full_adder<V>(ones1, ones2, plane[0], twos[3]);
  const I32 more = full_adder<V>(twos[0], twos[1], twos[2], fours[0]);
  plane[1] = full_adder<V>(more, twos[3], plane[1], fours[1]);
  plane[2] = full_adder<V>(fours[0], fours[1], plane[2], eights);
  return eights;
}

}  // namespace
}  // namespace bitspike
