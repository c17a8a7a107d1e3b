// Images made larger by a whole factor: docs/format.md, op `upsample`. Plain loops for the compiler's vectorizer.
#pragma once
#include "kernels.h"

namespace bitspike {

// Rows [row0, row1) of the enlarged image, from one image [height, width] of pixels of `pixel_bytes` bytes.
void upsample_nearest(const char* image, int width, size_t pixel_bytes, int factor, int row0, int row1, char* y);
// Of potentials; factor is a power of two. row: scratch of width * channels numbers.
void upsample_bilinear(const int32_t* image, int height, int width, int channels, int factor, int row0, int row1,
                       int64_t* row, int32_t* y);

}  // namespace bitspike
