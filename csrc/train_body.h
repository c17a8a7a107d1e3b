// The training kernels as plain loops, written so that the compiler's vectorizer takes them; included once per
// instruction set. Everything is in an anonymous namespace: two instruction sets never share an inline function.
//
// The build must not contract a * b + c into one rounding (-ffp-contract=off): results equal eager torch's bit by bit.
#pragma once
#include <cmath>
#include <cstring>

#include "train.h"
#include "train_depthwise.h"

namespace bitspike {
namespace {

constexpr size_t kBlock = 256;  // elements handled between two mask packings: stays in L1, a multiple of 8
constexpr size_t kChunk = 64 * kBlock;  // elements a thread takes at a time

struct F32 {
  using Store = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
  static float round(float x) { return x; }
};

struct BF16 {
  using Store = uint16_t;
  static float load(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  // To nearest, ties to even; NaN becomes torch's 0x7fc0.
  static uint16_t store(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0u : up);
  }
  static float round(float x) { return load(store(x)); }
};

}  // namespace
}  // namespace bitspike

#include "train_lif.h"  // needs F32 and BF16

namespace bitspike {
namespace {

// Eight bytes of 0/1 -> one byte, first element in the lowest bit.
inline uint8_t pack8(const uint8_t* bytes) {
  uint64_t v;
  memcpy(&v, bytes, 8);
  return static_cast<uint8_t>((v * 0x0102040810204080ull) >> 56);
}

template <class T>
inline void count_block(const typename T::Store* x, typename T::Store* y, uint8_t* mask, size_t n, float levels,
                        float gain, float scale) {
  alignas(64) uint8_t inside[kBlock];
  for (size_t i = 0; i < n; ++i) {
    const float u = T::round(T::load(x[i]) * gain);
    inside[i] = (u > 0) & (u < levels);
    float v = u < 0 ? 0.0f : u;  // false for NaN, which stays
    v = v > levels ? levels : v;
    y[i] = T::store(std::floor(T::round(v + 0.5f)) * scale);
  }
  for (size_t i = n; i < (n + 7) / 8 * 8; ++i) inside[i] = 0;
  for (size_t i = 0; i < n; i += 8) mask[i / 8] = pack8(inside + i);
}

template <class T>
void count_forward_as(const void* x, void* y, uint8_t* mask, size_t count, float levels, float gain, float scale,
                      int threads) {
  using S = typename T::Store;
  const S* from = static_cast<const S*>(x);
  S* to = static_cast<S*>(y);
  const size_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (size_t c = 0; c < chunks; ++c) {
    const size_t end = (c + 1) * kChunk < count ? (c + 1) * kChunk : count;
    for (size_t i = c * kChunk; i < end; i += kBlock) {
      if (end - i >= kBlock)
        count_block<T>(from + i, to + i, mask + i / 8, kBlock, levels, gain, scale);
      else
        count_block<T>(from + i, to + i, mask + i / 8, end - i, levels, gain, scale);
    }
  }
}

template <class T>
inline void mask_block(const typename T::Store* gy, const uint8_t* mask, typename T::Store* gx, size_t n, float slope) {
  alignas(64) uint8_t inside[kBlock];
  for (size_t i = 0; i < n; i += 8) {
    // byte k of the product's copies keeps bit k only; any bit left becomes 1
    const uint64_t spread = mask[i / 8] * 0x0101010101010101ull & 0x8040201008040201ull;
    const uint64_t ones = ((spread + 0x7f7f7f7f7f7f7f7full) | spread) >> 7 & 0x0101010101010101ull;
    memcpy(inside + i, &ones, 8);
  }
  for (size_t i = 0; i < n; ++i)
    gx[i] = T::store(T::load(gy[i]) * static_cast<float>(static_cast<int32_t>(inside[i])) * slope);
}

template <class T>
void count_backward_as(const void* gy, const uint8_t* mask, void* gx, size_t count, float slope, int threads) {
  using S = typename T::Store;
  const S* from = static_cast<const S*>(gy);
  S* to = static_cast<S*>(gx);
  const size_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (size_t c = 0; c < chunks; ++c) {
    const size_t end = (c + 1) * kChunk < count ? (c + 1) * kChunk : count;
    for (size_t i = c * kChunk; i < end; i += kBlock) {
      if (end - i >= kBlock)
        mask_block<T>(from + i, mask + i / 8, to + i, kBlock, slope);
      else
        mask_block<T>(from + i, mask + i / 8, to + i, end - i, slope);
    }
  }
}

void count_forward(const void* x, void* y, uint8_t* mask, size_t count, bool bf16, float levels, float gain,
                   float scale, int threads) {
  (bf16 ? count_forward_as<BF16> : count_forward_as<F32>)(x, y, mask, count, levels, gain, scale, threads);
}

void count_backward(const void* gy, const uint8_t* mask, void* gx, size_t count, bool bf16, float slope, int threads) {
  (bf16 ? count_backward_as<BF16> : count_backward_as<F32>)(gy, mask, gx, count, slope, threads);
}

void lsq_forward(const float* w, const float* step, float* q, size_t channels, size_t size, size_t steps, float low,
                 float high, float smallest, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (channels * size > kChunk)
  for (size_t c = 0; c < channels; ++c) {
    const float given = step[steps > 1 ? c : 0];
    const float s = given < smallest ? smallest : given;
    const float* from = w + c * size;
    float* to = q + c * size;
    for (size_t i = 0; i < size; ++i) {
      float v = std::nearbyint(from[i] / s);
      v = v < low ? low : v;
      v = v > high ? high : v;
      to[i] = v * s;
    }
  }
}

void lsq_backward(const float* w, const float* step, const float* gq, float* gw, float* gstep, size_t channels,
                  size_t size, size_t steps, float low, float high, float smallest, float grad_scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (channels * size > kChunk)
  for (size_t c = 0; c < channels; ++c) {
    const float given = step[steps > 1 ? c : 0];
    const float s = given < smallest ? smallest : given;
    const float *from = w + c * size, *grad = gq + c * size;
    float* to = gw + c * size;
    constexpr int kLanes = 32;  // a fixed number of partial sums: vectorizes without reordering by the compiler
    float sums[kLanes] = {};
    const auto one = [&](size_t i, float& sum) {
      const float v = from[i] / s, g = grad[i];
      const float inside = (v >= low) & (v <= high) ? 1.0f : 0.0f;
      float level = std::nearbyint(v);
      level = level < low ? low : level;
      level = level > high ? high : level;
      sum += g * (level - v * inside);
      to[i] = g * inside;
    };
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int l = 0; l < kLanes; ++l) one(i + l, sums[l]);
    for (int l = 0; i < size; ++i, ++l) one(i, sums[l]);
    double total = 0;
    for (int l = 0; l < kLanes; ++l) total += sums[l];
    gstep[c] = static_cast<float>(total) * grad_scale;
  }
}

// Elements i and i + half of a block share a byte: no shuffling, whatever the vector's width.
template <class T>
inline bool pack_block(const typename T::Store* y, uint8_t* codes, size_t n, float scale, float inverse) {
  alignas(64) uint8_t counts[kBlock];
  const size_t half = (n + 1) / 2;
  uint32_t wrong = 0;
  for (size_t i = 0; i < n; ++i) {
    const float v = T::load(y[i]);
    const float c = v * inverse + 0.5f;
    const int32_t k = static_cast<int32_t>(c > 15.5f ? 15.5f : c > 0 ? c : 0.0f);
    wrong |= !(T::load(T::store(static_cast<float>(k) * scale)) == v);
    counts[i] = static_cast<uint8_t>(k);
  }
  counts[n < kBlock ? n : 0] = n < kBlock ? 0 : counts[0];  // an odd n reads one further
  for (size_t i = 0; i < half; ++i) codes[i] = static_cast<uint8_t>(counts[i] | counts[i + half] << 4);
  return !wrong;
}

template <class T>
bool pack_counts_as(const void* y, uint8_t* codes, size_t count, float scale, int threads) {
  using S = typename T::Store;
  const S* from = static_cast<const S*>(y);
  const size_t chunks = (count + kChunk - 1) / kChunk;
  int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1) reduction(| : wrong)
  for (size_t c = 0; c < chunks; ++c) {
    const size_t end = (c + 1) * kChunk < count ? (c + 1) * kChunk : count;
    for (size_t i = c * kChunk; i < end; i += kBlock)
      wrong |= !(end - i >= kBlock ? pack_block<T>(from + i, codes + i / 2, kBlock, scale, 1 / scale)
                                   : pack_block<T>(from + i, codes + i / 2, end - i, scale, 1 / scale));
  }
  return !wrong;
}

template <class T>
inline void unpack_block(const uint8_t* codes, typename T::Store* y, size_t n, float scale) {
  const size_t half = (n + 1) / 2;
  for (size_t i = 0; i < half; ++i) y[i] = T::store(static_cast<float>(codes[i] & 15) * scale);
  for (size_t i = half; i < n; ++i) y[i] = T::store(static_cast<float>(codes[i - half] >> 4) * scale);
}

template <class T>
void unpack_counts_as(const uint8_t* codes, void* y, size_t count, float scale, int threads) {
  using S = typename T::Store;
  S* to = static_cast<S*>(y);
  const size_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (size_t c = 0; c < chunks; ++c) {
    const size_t end = (c + 1) * kChunk < count ? (c + 1) * kChunk : count;
    for (size_t i = c * kChunk; i < end; i += kBlock) {
      if (end - i >= kBlock)
        unpack_block<T>(codes + i / 2, to + i, kBlock, scale);
      else
        unpack_block<T>(codes + i / 2, to + i, end - i, scale);
    }
  }
}

bool pack_counts(const void* y, uint8_t* codes, size_t count, bool bf16, float scale, int threads) {
  return (bf16 ? pack_counts_as<BF16> : pack_counts_as<F32>)(y, codes, count, scale, threads);
}

void unpack_counts(const uint8_t* codes, void* y, size_t count, bool bf16, float scale, int threads) {
  (bf16 ? unpack_counts_as<BF16> : unpack_counts_as<F32>)(codes, y, count, scale, threads);
}

}  // namespace
}  // namespace bitspike

#define BITSPIKE_TRAIN_KERNELS(label) \
  { label, count_forward, count_backward, lsq_forward, lsq_backward, pack_counts, unpack_counts, \
    lif_forward, lif_backward, depthwise_weight }
