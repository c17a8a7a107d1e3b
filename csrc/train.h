// Training kernels: one pass over memory for what eager torch does in many. Raw pointers, no torch.
//
// Each function is compiled once per instruction set from train_body.h and picked at run time by train.cc. All of them
// are deterministic: what an element (or a sum) becomes never depends on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitspike {

// A depthwise convolution, stride and dilation 1, channels_last: x [images, height, width, channels],
// y [images, out_height, out_width, channels]; kernel is 3, 5 or 7; channels a multiple of 16.
struct DepthwiseShape {
  int images, height, width, channels, kernel, pad, out_height, out_width;
};

// A LIF neuron, see neurons.py: `steps` steps of `count` elements each, the steps one behind the other in memory.
enum LifReset { kHard, kSoft, kNone };
enum LifSurrogate { kSigmoid, kTriangle, kArcTan, kRectangle };
constexpr int kLifSteps = 32;  // the most that lif_backward takes
struct LifShape {
  int steps;
  size_t count;
  float decay, gain, threshold;
  int reset;
  bool strict, detach;  // fire above the threshold only; no gradient through the reset
  int surrogate;
  float surrogate_parameter;
  int high;   // codes of the stored potential: -high..high, 0: not rounded; with `bounds` only
  bool tanh;  // the stored potential is tanh(v)
};

struct TrainKernels {
  const char* name;

  // y = floor(clip(gain x, 0, levels) + 0.5) * scale, rounding after every step in the dtype of x as eager torch does
  // (bf16 holds its steps in bf16). mask: bit i of byte j is element 8 j + i, 1 where 0 < gain x < levels;
  // (count + 7) / 8 bytes. NaN goes through to y and has mask 0.
  void (*count_forward)(const void* x, void* y, uint8_t* mask, size_t count, bool bf16, float levels, float gain,
                        float scale, int threads);
  // gx = gy * mask * slope. A product, not a choice: NaN and infinite gradients come through as NaN, as in eager torch.
  void (*count_backward)(const void* gy, const uint8_t* mask, void* gx, size_t count, bool bf16, float slope,
                         int threads);

  // float32 weights [channels, size], one step per channel (or one for all: steps = 1), held above `smallest`:
  // q = clip(rint(w / step), low, high) * step
  void (*lsq_forward)(const float* w, const float* step, float* q, size_t channels, size_t size, size_t steps,
                      float low, float high, float smallest, int threads);
  // gw = gq inside the range, 0 outside; gstep[c] = grad_scale * sum gq * slope over the channel (always one per channel;
  // the caller adds them up when there is one step)
  void (*lsq_backward)(const float* w, const float* step, const float* gq, float* gw, float* gstep, size_t channels,
                       size_t size, size_t steps, float low, float high, float smallest, float grad_scale, int threads);

  // y = count * scale -> the counts (0..15), half a byte each, (count + 1) / 2 bytes in an order of its own. False where an
  // element is anything else (NaN too): then the codes mean nothing.
  bool (*pack_counts)(const void* y, uint8_t* codes, size_t count, bool bf16, float scale, int threads);
  // And back, exactly.
  void (*unpack_counts)(const uint8_t* codes, void* y, size_t count, bool bf16, float scale, int threads);

  // Spikes s of steps first..last-1. state (or null): the potential after the reset, not yet quantized; read where first > 0,
  // written, and its largest size returned. bounds (or null): after step t the potential is quantized with bounds[t].
  float (*lif_forward)(const void* x, void* s, float* state, int first, int last, const LifShape& shape,
                       const float* bounds, bool bf16, int threads);
  // gx of all steps from x and gs, with the bounds of the forward pass.
  void (*lif_backward)(const void* x, const void* gs, void* gx, const LifShape& shape, const float* bounds, bool bf16,
                       int threads);

  // gw[c, ky, kx] = sum over images and pixels of g * x: float32 whatever x and g are.
  void (*depthwise_weight)(const void* x, const void* g, float* gw, const DepthwiseShape& shape, bool bf16, int threads);
};

// Defined in train_base.cc, train_avx2.cc, train_avx512.cc.
extern const TrainKernels train_base;
#ifdef BITSPIKE_X86
extern const TrainKernels train_avx2, train_avx512;
#endif

}  // namespace bitspike
