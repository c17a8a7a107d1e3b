// Weight gradient of a depthwise convolution in channels_last; included by train_body.h.
//
// PyTorch's CPU path for it is 10 to 20 times slower than the forward pass. Here one vector holds 16 channels of a pixel, and
// the K sums of a kernel row stay in registers over an image row. Sums go row by row, image by image, in groups whose
// number depends on the batch alone: the same bits for any number of threads.
#pragma once
#include <vector>

#include "train.h"

namespace bitspike {
namespace {

constexpr size_t kLane = 16;
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));

inline Lanes lanes(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Lanes lanes(const uint16_t* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  Lanes v;
  memcpy(&v, &w, sizeof v);
  return v;
}

// One image, 16 channels: sums[(ky * K + kx) * channels + lane] += over the image.
template <class S, int K>
void depthwise_image(const S* x, const S* g, const DepthwiseShape& d, float* sums) {
  const int C = d.channels;
  const int first = d.pad, last = d.width - K + d.pad;  // ox in [first, last]: no tap falls outside the row
  for (int oy = 0; oy < d.out_height; ++oy)
    for (int ky = 0; ky < K; ++ky) {
      const int iy = oy + ky - d.pad;
      if (iy < 0 || iy >= d.height) continue;
      const S* xs = x + static_cast<size_t>(iy) * d.width * C;
      const S* gs = g + static_cast<size_t>(oy) * d.out_width * C;
      Lanes a[K];
      for (int k = 0; k < K; ++k) a[k] = Lanes{};
      const auto edge = [&](int ox) {
        const Lanes go = lanes(gs + static_cast<size_t>(ox) * C);
        for (int k = 0; k < K; ++k) {
          const int ix = ox + k - d.pad;
          if (ix >= 0 && ix < d.width) a[k] += go * lanes(xs + static_cast<size_t>(ix) * C);
        }
      };
      int ox = 0;
      for (; ox < d.out_width && ox < first; ++ox) edge(ox);
      for (; ox < d.out_width && ox <= last; ++ox) {
        const Lanes go = lanes(gs + static_cast<size_t>(ox) * C);
        const S* xo = xs + static_cast<size_t>(ox - d.pad) * C;
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) a[k] += go * lanes(xo + static_cast<size_t>(k) * C);
      }
      for (; ox < d.out_width; ++ox) edge(ox);
      for (int k = 0; k < K; ++k) {
        float* to = sums + static_cast<size_t>(ky * K + k) * C;
        const Lanes v = lanes(to) + a[k];
        memcpy(to, &v, sizeof v);
      }
    }
}

template <class S>
void depthwise_weight_as(const void* x, const void* g, float* gw, const DepthwiseShape& d, int threads) {
  const S *xs = static_cast<const S*>(x), *gs = static_cast<const S*>(g);
  const int taps = d.kernel * d.kernel, blocks = d.channels / static_cast<int>(kLane);
  const int per_group = (d.images + 15) / 16, groups = (d.images + per_group - 1) / per_group;
  const size_t size = static_cast<size_t>(taps) * d.channels;
  std::vector<float> partial(groups * size, 0.0f);
  const size_t in = static_cast<size_t>(d.height) * d.width * d.channels;
  const size_t out = static_cast<size_t>(d.out_height) * d.out_width * d.channels;
  const auto image = d.kernel == 3 ? depthwise_image<S, 3> : d.kernel == 5 ? depthwise_image<S, 5> : depthwise_image<S, 7>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int task = 0; task < groups * blocks; ++task) {
    const int group = task / blocks;
    const size_t c = static_cast<size_t>(task % blocks) * kLane;
    for (int n = group * per_group; n < d.images && n < (group + 1) * per_group; ++n)
      image(xs + n * in + c, gs + n * out + c, d, partial.data() + group * size + c);
  }
  for (size_t c = 0; c < static_cast<size_t>(d.channels); ++c)
    for (int t = 0; t < taps; ++t) {
      float sum = 0;
      for (int group = 0; group < groups; ++group) sum += partial[group * size + t * d.channels + c];
      gw[c * taps + t] = sum;
    }
}

void depthwise_weight(const void* x, const void* g, float* gw, const DepthwiseShape& d, bool bf16, int threads) {
  (bf16 ? depthwise_weight_as<uint16_t> : depthwise_weight_as<float>)(x, g, gw, d, threads);
}

}  // namespace
}  // namespace bitspike
