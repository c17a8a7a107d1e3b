// Weights of a file: bit streams to codes, and the proof that no sum of a convolution leaves int32.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitspike {

// codes[i] = table[field i], fields of `bits` (1..8) bits each, least significant bit first. packed: whole bytes.
void unpack_codes(const uint8_t* packed, size_t count, int bits, const int8_t* table, int8_t* codes);

// The largest, over outputs, of the sum over taps and channels of |weight| * largest[channel].
// weight: [outputs, taps, channels / groups]; largest: [channels], each 0..2^15, outputs * taps * channels < 2^33.
int64_t accumulator_bound(const int8_t* weight, size_t outputs, size_t taps, size_t group_channels, size_t groups,
                          const int64_t* largest);

}  // namespace bitspike
