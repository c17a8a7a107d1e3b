// A LIF neuron over a whole sequence, forward and backward, one pass over memory each; included by train_body.h.
//
// Forward rounds after every operation in the dtype of x, as eager torch does: the same spikes. Backward keeps only x, runs
// the forward recursion again in registers and goes back through it in float32: eager torch stores about eight values an
// element and step, and reads them back.
#pragma once
#include "train.h"

namespace bitspike {
namespace {

constexpr size_t kLifBlock = 64;         // elements whose whole history is held in L1
constexpr size_t kLifChunk = 64 * kLifBlock;

// e^x within 2 ulp for x in -87..88, clamped beyond: a loop of it is vectorized, std::exp is not.
inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float tanh_fast(float x) {
  const float a = x < 0 ? -x : x;
  const float y = 1.0f - 2.0f / (exp_fast(2.0f * a) + 1.0f);
  return x < 0 ? -y : y;
}

// d spike / d potential at `distance` from the threshold; `given` is the surrogate's one parameter.
inline void surrogate_slopes(int kind, float given, const float* distance, float* slope) {
  switch (kind) {
    case kSigmoid:
      for (size_t i = 0; i < kLifBlock; ++i) {
        const float sig = 1.0f / (1.0f + exp_fast(-given * distance[i]));
        slope[i] = given * sig * (1.0f - sig);
      }
      return;
    case kTriangle:
      for (size_t i = 0; i < kLifBlock; ++i) {
        const float d = distance[i] < 0 ? -distance[i] : distance[i];
        const float y = 1.0f - d / given;
        slope[i] = (y < 0 ? 0.0f : y) / given;
      }
      return;
    case kArcTan:
      for (size_t i = 0; i < kLifBlock; ++i) {
        const float u = 1.57079633f * given * distance[i];
        slope[i] = given * 0.5f / (1.0f + u * u);
      }
      return;
    default:
      for (size_t i = 0; i < kLifBlock; ++i) {
        const float d = distance[i] < 0 ? -distance[i] : distance[i];
        slope[i] = (d < given * 0.5f ? 1.0f : 0.0f) / given;
      }
  }
}

template <class T>
inline void lif_reset(const LifShape& p, const float* h, const float* s, float* v) {
  if (p.reset == kHard)
    for (size_t i = 0; i < kLifBlock; ++i) v[i] = T::round((1.0f - s[i]) * h[i]);
  else if (p.reset == kSoft)
    for (size_t i = 0; i < kLifBlock; ++i) v[i] = T::round(h[i] - T::round(p.threshold * s[i]));
  else
    for (size_t i = 0; i < kLifBlock; ++i) v[i] = h[i];
}

// The stored potential: v -> codes * step. z is what is rounded; its slope is 1 - z^2 where it is a tanh. Without codes
// (high = 0) it is z itself.
template <class T>
inline void lif_store(const LifShape& p, float bound, float* v, float* z) {
  const float high = static_cast<float>(p.high);
  const float step = T::round(bound / high);
  if (p.tanh)
    for (size_t i = 0; i < kLifBlock; ++i) z[i] = T::round(tanh_fast(v[i]));
  else
    for (size_t i = 0; i < kLifBlock; ++i) z[i] = v[i];
  if (p.high == 0) {
    for (size_t i = 0; i < kLifBlock; ++i) v[i] = z[i];
    return;
  }
  for (size_t i = 0; i < kLifBlock; ++i) {
    float code = std::nearbyint(T::round(z[i] / step));
    code = code < -high ? -high : code;
    code = code > high ? high : code;
    v[i] = T::round(code * step);
  }
}

template <class T>
inline void lif_fire(const LifShape& p, const float* x, const float* v, float* h, float* s) {
  const float decay = p.decay, gain = p.gain, threshold = p.threshold;
  for (size_t i = 0; i < kLifBlock; ++i) h[i] = T::round(T::round(decay * v[i]) + T::round(gain * x[i]));
  if (p.strict)
    for (size_t i = 0; i < kLifBlock; ++i) s[i] = T::round(h[i] - threshold) > 0 ? 1.0f : 0.0f;
  else
    for (size_t i = 0; i < kLifBlock; ++i) s[i] = T::round(h[i] - threshold) >= 0 ? 1.0f : 0.0f;
}

// Up to kLifBlock elements; a shorter piece goes through a padded copy.
template <class T>
inline void load_block(const typename T::Store* x, float* to, size_t n) {
  if (n == kLifBlock)
    for (size_t i = 0; i < kLifBlock; ++i) to[i] = T::load(x[i]);
  else
    for (size_t i = 0; i < kLifBlock; ++i) to[i] = i < n ? T::load(x[i]) : 0.0f;
}

template <class T>
inline void store_block(const float* from, typename T::Store* to, size_t n) {
  if (n == kLifBlock)
    for (size_t i = 0; i < kLifBlock; ++i) to[i] = T::store(from[i]);
  else
    for (size_t i = 0; i < n; ++i) to[i] = T::store(from[i]);
}

template <class T>
float lif_forward_as(const void* x, void* s, float* state, int first, int last, const LifShape& p, const float* bounds,
                     int threads) {
  using S = typename T::Store;
  const size_t chunks = (p.count + kLifChunk - 1) / kLifChunk;
  float peak = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1) reduction(max : peak)
  for (size_t c = 0; c < chunks; ++c) {
    alignas(64) float tops[kLifBlock] = {};
    const size_t end = (c + 1) * kLifChunk < p.count ? (c + 1) * kLifChunk : p.count;
    for (size_t i = c * kLifChunk; i < end; i += kLifBlock) {
      const size_t n = end - i < kLifBlock ? end - i : kLifBlock;
      alignas(64) float in[kLifBlock], v[kLifBlock], h[kLifBlock], fired[kLifBlock], z[kLifBlock];
      if (first && state)
        load_block<F32>(state + i, v, n);
      else
        for (size_t k = 0; k < kLifBlock; ++k) v[k] = 0;
      for (int t = first; t < last; ++t) {
        if (t && bounds) lif_store<T>(p, bounds[t - 1], v, z);
        load_block<T>(static_cast<const S*>(x) + t * p.count + i, in, n);
        lif_fire<T>(p, in, v, h, fired);
        store_block<T>(fired, static_cast<S*>(s) + t * p.count + i, n);
        if (t + 1 < last || state) lif_reset<T>(p, h, fired, v);
      }
      if (state) {
        store_block<F32>(v, state + i, n);
        for (size_t k = 0; k < kLifBlock; ++k) {  // what pads a short block stays at 0
          const float size = v[k] < 0 ? -v[k] : v[k];
          tops[k] = size > tops[k] ? size : tops[k];
        }
      }
    }
    for (size_t k = 0; k < kLifBlock; ++k) peak = tops[k] > peak ? tops[k] : peak;
  }
  return peak;
}

template <class T>
void lif_backward_as(const void* x, const void* gs, void* gx, const LifShape& p, const float* bounds, int threads) {
  using S = typename T::Store;
  const size_t chunks = (p.count + kLifChunk - 1) / kLifChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (size_t c = 0; c < chunks; ++c) {
    alignas(64) float h[kLifSteps][kLifBlock], z[kLifSteps][kLifBlock];
    const size_t end = (c + 1) * kLifChunk < p.count ? (c + 1) * kLifChunk : p.count;
    for (size_t i = c * kLifChunk; i < end; i += kLifBlock) {
      const size_t n = end - i < kLifBlock ? end - i : kLifBlock;
      alignas(64) float in[kLifBlock], v[kLifBlock] = {}, fired[kLifBlock], slope[kLifBlock], gv[kLifBlock] = {};
      for (int t = 0; t < p.steps; ++t) {
        if (t && bounds) lif_store<T>(p, bounds[t - 1], v, z[t]);
        load_block<T>(static_cast<const S*>(x) + t * p.count + i, in, n);
        lif_fire<T>(p, in, v, h[t], fired);
        lif_reset<T>(p, h[t], fired, v);
      }
      for (int t = p.steps - 1; t >= 0; --t) {
        for (size_t k = 0; k < kLifBlock; ++k) in[k] = T::round(h[t][k] - p.threshold);
        surrogate_slopes(p.surrogate, p.surrogate_parameter, in, slope);
        if (p.strict)
          for (size_t k = 0; k < kLifBlock; ++k) fired[k] = in[k] > 0 ? 1.0f : 0.0f;
        else
          for (size_t k = 0; k < kLifBlock; ++k) fired[k] = in[k] >= 0 ? 1.0f : 0.0f;
        load_block<T>(static_cast<const S*>(gs) + t * p.count + i, in, n);
        if (p.reset == kHard) {
          const float through = p.detach ? 0.0f : 1.0f;
          for (size_t k = 0; k < kLifBlock; ++k)
            gv[k] = gv[k] * (1.0f - fired[k]) + (in[k] - through * gv[k] * h[t][k]) * slope[k];
        } else if (p.reset == kSoft) {
          const float through = p.detach ? 0.0f : p.threshold;
          for (size_t k = 0; k < kLifBlock; ++k) gv[k] = gv[k] + (in[k] - through * gv[k]) * slope[k];
        } else {
          for (size_t k = 0; k < kLifBlock; ++k) gv[k] = gv[k] + in[k] * slope[k];
        }
        for (size_t k = 0; k < kLifBlock; ++k) in[k] = p.gain * gv[k];
        store_block<T>(in, static_cast<S*>(gx) + t * p.count + i, n);
        for (size_t k = 0; k < kLifBlock; ++k) gv[k] *= p.decay;
        if (t && bounds) {
          const float bound = bounds[t - 1], curve = p.tanh ? 1.0f : 0.0f;
          for (size_t k = 0; k < kLifBlock; ++k) {
            const float y = z[t][k], size = y < 0 ? -y : y;
            gv[k] *= (size < bound ? 1.0f : 0.0f) * (1.0f - curve * y * y);
          }
        }
      }
    }
  }
}

float lif_forward(const void* x, void* s, float* state, int first, int last, const LifShape& shape, const float* bounds,
                  bool bf16, int threads) {
  return (bf16 ? lif_forward_as<BF16> : lif_forward_as<F32>)(x, s, state, first, last, shape, bounds, threads);
}

void lif_backward(const void* x, const void* gs, void* gx, const LifShape& shape, const float* bounds, bool bf16,
                  int threads) {
  (bf16 ? lif_backward_as<BF16> : lif_backward_as<F32>)(x, gs, gx, shape, bounds, threads);
}

}  // namespace
}  // namespace bitspike
