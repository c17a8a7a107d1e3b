// Whole-batch operations, split over threads. Pieces never share an output, and integers do not care about order, so the
// numbers are the same for any number of threads. Arguments are as in kernels.h, checked by the caller.
#pragma once
#include "kernels.h"

namespace bitspike {

void conv_images(const Kernels&, const Conv&, const void* packed, const void* x, size_t images, int32_t* y, int threads);
void quantize_pixels(const Kernels&, const int32_t* x, size_t pixels, size_t channels, const int32_t* m,
                     bool per_channel, int shift, int32_t lo, int32_t hi, bool is_signed, void* y, int threads);
void affine_pixels(const Kernels&, Kind, const void* x, size_t pixels, size_t channels, const int32_t* m,
                   const int32_t* b, bool per_channel, int shift, int32_t* y, int threads);
void add_values(const Kernels&, const int32_t* a, const int32_t* b, size_t count, int32_t* y, int threads);
void maxpool_images(const Kernels&, const Pool&, const void* x, size_t images, void* y, int threads);
void attention_images(const Kernels&, const Attention&, int heads, const uint8_t* q, const uint8_t* k,
                      const uint8_t* v, size_t images, int32_t* y, int threads);
void mean_space(const Kernels&, Kind, const void* x, size_t images, size_t pixels, size_t channels, int32_t m,
                int32_t* y, int threads);
void mean_time(const Kernels&, Kind, const void* x, size_t steps, size_t count, int32_t m, int32_t* y, int threads);
// x holds x_steps steps (1 or p.steps) of `count` potentials.
void lif_steps(const Kernels&, const Lif& p, const int32_t* x, size_t x_steps, size_t count, uint8_t* y, int threads);
void ielif_steps(const Kernels&, const IeLif& p, const int32_t* x, size_t x_steps, size_t count, uint8_t* y,
                 int threads);
void lookup_pixels(const Kernels&, const uint8_t* x, size_t pixels, size_t channels, const int8_t* table, int8_t* y,
                   int threads);

}  // namespace bitspike
