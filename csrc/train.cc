// The extension module bitspike._train: addresses come in as integers, so that neither torch nor its headers are needed
// here. Every check of dtype, shape and layout is made by the caller, src/bitspike/_train_kernels.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "train.h"

namespace nb = nanobind;

namespace bitspike {
namespace {

const TrainKernels& pick() {
#ifdef BITSPIKE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return train_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return train_avx2;
#endif
  return train_base;
}

const TrainKernels& kernels() {
  static const TrainKernels& picked = pick();
  return picked;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace bitspike

NB_MODULE(_train, m) {
  using namespace bitspike;
  using nogil = nb::call_guard<nb::gil_scoped_release>;
  m.attr("version") = 4;  // what _train_kernels.py expects; an older build is not used
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("count_forward", [](uintptr_t x, uintptr_t y, uintptr_t mask, size_t count, bool bf16, float levels, float gain,
                            float scale, int threads) {
    kernels().count_forward(at<void>(x), at<void>(y), at<uint8_t>(mask), count, bf16, levels, gain, scale, threads);
  }, nogil());
  m.def("count_backward", [](uintptr_t gy, uintptr_t mask, uintptr_t gx, size_t count, bool bf16, float slope,
                             int threads) {
    kernels().count_backward(at<void>(gy), at<uint8_t>(mask), at<void>(gx), count, bf16, slope, threads);
  }, nogil());
  m.def("lsq_forward", [](uintptr_t w, uintptr_t step, uintptr_t q, size_t channels, size_t size, size_t steps,
                          float low, float high, float smallest, int threads) {
    kernels().lsq_forward(at<float>(w), at<float>(step), at<float>(q), channels, size, steps, low, high, smallest,
                          threads);
  }, nogil());
  m.def("lsq_backward", [](uintptr_t w, uintptr_t step, uintptr_t gq, uintptr_t gw, uintptr_t gstep, size_t channels,
                           size_t size, size_t steps, float low, float high, float smallest, float grad_scale,
                           int threads) {
    kernels().lsq_backward(at<float>(w), at<float>(step), at<float>(gq), at<float>(gw), at<float>(gstep), channels, size,
                           steps, low, high, smallest, grad_scale, threads);
  }, nogil());
  m.def("pack_counts", [](uintptr_t y, uintptr_t codes, size_t count, bool bf16, float scale, int threads) {
    return kernels().pack_counts(at<void>(y), at<uint8_t>(codes), count, bf16, scale, threads);
  }, nogil());
  m.def("unpack_counts", [](uintptr_t codes, uintptr_t y, size_t count, bool bf16, float scale, int threads) {
    kernels().unpack_counts(at<uint8_t>(codes), at<void>(y), count, bf16, scale, threads);
  }, nogil());
  m.attr("lif_steps") = kLifSteps;
  nb::class_<LifShape>(m, "LifShape")
      .def(nb::init<int, size_t, float, float, float, int, bool, bool, int, float, int, bool>());
  m.def("lif_forward", [](uintptr_t x, uintptr_t s, uintptr_t state, int first, int last, const LifShape& shape,
                          uintptr_t bounds, bool bf16, int threads) {
    return kernels().lif_forward(at<void>(x), at<void>(s), at<float>(state), first, last, shape, at<float>(bounds), bf16,
                                 threads);
  }, nogil());
  m.def("lif_backward", [](uintptr_t x, uintptr_t gs, uintptr_t gx, const LifShape& shape, uintptr_t bounds, bool bf16,
                           int threads) {
    kernels().lif_backward(at<void>(x), at<void>(gs), at<void>(gx), shape, at<float>(bounds), bf16, threads);
  }, nogil());
  m.def("depthwise_weight", [](uintptr_t x, uintptr_t g, uintptr_t gw, int images, int height, int width, int channels,
                               int kernel, int pad, int out_height, int out_width, bool bf16, int threads) {
    const DepthwiseShape shape{images, height, width, channels, kernel, pad, out_height, out_width};
    kernels().depthwise_weight(at<void>(x), at<void>(g), at<float>(gw), shape, bf16, threads);
  }, nogil());
}
