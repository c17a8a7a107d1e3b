// Steps of spiking networks over time that need no instruction set of their own: attention by maps
// of spikes. Plain loops for the compiler's vectorizer; docs/format.md has the definitions.
#pragma once
#include "kernels.h"

namespace bitspike {

// One image and time step; arrays are [tokens, heads * width].
struct Heads {
  size_t tokens, heads, width;
};
// y: rows [row0, row1) of the map, [rows, heads, side]. over_channels: side = tokens, a = q, b = k; else side = width, a = v.
void attention_map(const Heads&, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1,
                   int32_t m, int shift, int32_t* y);
// y: tokens [first, first + count). m: one number per head.
void attention_read(const Heads&, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first, size_t count,
                    const int32_t* m, int shift, int32_t* y);
// y[c] = sat32(rshift(m * sum over positions of k v, s)); the sum is below 2^31.
void coincidences(const uint8_t* k, const uint8_t* v, size_t positions, size_t channels, int32_t m, int shift, int32_t* y);
void add_codes(const uint8_t* a, const uint8_t* b, size_t count, uint8_t* y);
// y = q * chosen[channel]
void mask_codes(const uint8_t* q, const uint8_t* chosen, size_t positions, size_t channels, uint8_t* y);

}  // namespace bitspike
