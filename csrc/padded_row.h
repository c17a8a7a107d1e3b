// A row of the padded image as unsigned codes, kBytes channels at a time, for depthwise convolutions that bring codes into an order of their own.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// What padding holds, of `lanes` channels from `channel` on, as unsigned codes: signed ones are code + 128.
template <class V>
typename V::I32 pad_of(const Conv& c, int channel, int lanes) {
  uint8_t codes[V::kBytes] = {};
  for (int i = 0; i < lanes; ++i) codes[i] = static_cast<uint8_t>(c.pad_value[channel + i] + (c.kind == Kind::s8 ? 128 : 0));
  return V::load_bytes(reinterpret_cast<const int8_t*>(codes));
}

// put(codes) for columns [left, left + count) of row y of the padded image, in their order; outside the image, put(pad).
template <class V, class Put>
BITSPIKE_INLINE void padded_row(const Conv& c, const uint8_t* image, int y, int left, size_t count, int channel, int lanes, typename V::I32 pad,
                                const Put& put) {
  const int end = left + static_cast<int>(count), last = y < 0 || y >= c.height ? left : at_most(c.width, end);
  int x = left;
  for (; x < 0 && x < end; ++x) put(pad);
  const typename V::I32 flip = V::splat(c.kind == Kind::s8 ? static_cast<int32_t>(0x80808080u) : 0);
  const uint8_t* from = image + (static_cast<ptrdiff_t>(y) * c.width + x) * c.channels + channel;
  const auto inside = [&](int some) {
    for (; x < last; ++x, from += c.channels) put(V::xor_(V::load_codes(from, some), flip));
  };
  if (lanes == V::kBytes) inside(V::kBytes);  // a number that the compiler knows
  else inside(lanes);
  for (; x < end; ++x) put(pad);
}

}  // namespace
}  // namespace bitspike
