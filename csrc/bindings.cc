// What Python sees. Checks dtype, shape and contiguity, releases the GIL, and calls; no arithmetic.
// Arrays are [S, B, H, W, C], C-contiguous; y is the caller's and is written to.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "codes.h"
#include "drive.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitspike {
namespace {

using In = nb::ndarray<nb::ro, nb::ndim<5>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<5>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N>
using Const = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

template <class Array>
Kind kind_of(const Array& x) {
  if (x.dtype() == nb::dtype<uint8_t>()) return Kind::u8;
  if (x.dtype() == nb::dtype<int8_t>()) return Kind::s8;
  if (x.dtype() == nb::dtype<int32_t>()) return Kind::i32;
  throw nb::type_error("arrays must be uint8, int8 or int32");
}

template <class A, class B>
bool same_shape(const A& a, const B& b, size_t from = 0) {
  for (size_t i = from; i < 5; ++i)
    if (a.shape(i) != b.shape(i)) return false;
  return true;
}

template <class Array>
size_t size(const Array& x, size_t from, size_t to) {
  size_t n = 1;
  for (size_t i = from; i < to; ++i) n *= x.shape(i);
  return n;
}

int window_count(size_t size, int kernel, int stride, int pad) {
  const long long span = static_cast<long long>(size) + 2LL * pad - kernel;
  require(span >= 0, "the kernel is larger than the padded image");
  return static_cast<int>(span / stride + 1);
}

void check_window(Pair kernel, Pair stride, Pair pad) {
  require(kernel.first > 0 && kernel.second > 0 && stride.first > 0 && stride.second > 0 && pad.first >= 0 &&
              pad.second >= 0,
          "kernel and stride must be positive, padding not negative");
}

// Owns copies of everything the kernels point at.
class PreparedConv {
 public:
  PreparedConv(const std::string& isa, Const<int8_t, 4> weight, Pair stride, Pair pad, int groups,
               Const<int16_t, 1> pad_value, Const<int32_t, 1> m, int shift, Const<int32_t, 1> b, bool is_signed)
      : kernels_(kernels_named(isa)),
        weight_(weight.data(), weight.data() + weight.size()),
        pad_value_(pad_value.data(), pad_value.data() + pad_value.size()),
        m_(m.data(), m.data() + m.size()),
        b_(b.data(), b.data() + b.size()) {
    check_window({int(weight.shape(1)), int(weight.shape(2))}, stride, pad);
    check_shift(shift);
    const size_t outputs = weight.shape(0);
    require(weight.size() > 0, "weights must not be empty");
    require(groups > 0 && outputs % groups == 0, "groups must divide the outputs");
    require(m.size() == outputs && b.size() == outputs, "m and b must have one number per output");
    require(pad_value.size() == weight.shape(3) * groups, "pad_value must have one number per input channel");
    const int lo = is_signed ? -128 : 0, hi = is_signed ? 127 : 255;
    for (const int16_t p : pad_value_) require(p >= lo && p <= hi, "pad_value must be a code of the input's kind");
    conv_.channels = int(pad_value.size());
    conv_.outputs = int(outputs);
    conv_.kernel_h = int(weight.shape(1)), conv_.kernel_w = int(weight.shape(2));
    conv_.stride_h = stride.first, conv_.stride_w = stride.second;
    conv_.pad_h = pad.first, conv_.pad_w = pad.second;
    conv_.groups = groups;
    conv_.kind = is_signed ? Kind::s8 : Kind::u8;
    conv_.shift = shift;
    conv_.weight = weight_.data(), conv_.pad_value = pad_value_.data();
    conv_.m = m_.data(), conv_.b = b_.data();
    conv_.lo = lo, conv_.hi = hi;
    describe_weights(conv_);
    const ConvKernel& kernel = kernels_.conv[static_cast<int>(Variant::dense)];
    kernel.pack(conv_, packed_.get(kernel.packed_bytes(conv_)));
    std::vector<int8_t>().swap(weight_);
    conv_.weight = nullptr;
  }
  PreparedConv(const PreparedConv&) = delete;

  void operator()(In x, Out y, int threads) const {
    require(kind_of(x) == conv_.kind, "the input's dtype is not the one this convolution was prepared for");
    require(kind_of(y) == Kind::i32, "the output must be int32");
    Conv c = conv_;
    require(x.shape(4) == size_t(c.channels), "the input has another number of channels");
    require(x.shape(2) < (1 << 24) && x.shape(3) < (1 << 24), "the image is too large");
    c.height = int(x.shape(2)), c.width = int(x.shape(3));
    c.out_height = window_count(c.height, c.kernel_h, c.stride_h, c.pad_h);
    c.out_width = window_count(c.width, c.kernel_w, c.stride_w, c.pad_w);
    require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1) && y.shape(2) == size_t(c.out_height) &&
                y.shape(3) == size_t(c.out_width) && y.shape(4) == size_t(c.outputs),
            "the output has the wrong shape");
    nb::gil_scoped_release release;
    conv_images(kernels_, c, packed_.get(0), x.data(), size(x, 0, 2), static_cast<int32_t*>(y.data()), threads);
  }

 private:
  const Kernels& kernels_;
  std::vector<int8_t> weight_;
  std::vector<int16_t> pad_value_;
  std::vector<int32_t> m_, b_;
  mutable Memory packed_;
  Conv conv_{};
};

void quantize(const std::string& isa, In x, Const<int32_t, 1> m, int shift, int lo, int hi, Out y, int threads) {
  const Kind kind = kind_of(y);
  require(kind_of(x) == Kind::i32 && kind != Kind::i32, "quantize goes from int32 to uint8 or int8");
  require(same_shape(x, y), "x and y must have the same shape");
  require(m.size() == 1 || m.size() == x.shape(4), "m must have 1 number or one per channel");
  require(lo <= hi && lo >= (kind == Kind::s8 ? -128 : 0) && hi <= (kind == Kind::s8 ? 127 : 255), "lo..hi is wrong");
  check_shift(shift);
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  quantize_pixels(k, static_cast<const int32_t*>(x.data()), size(x, 0, 4), x.shape(4), m.data(), m.size() > 1, shift,
                  lo, hi, kind == Kind::s8, y.data(), threads);
}

void affine(const std::string& isa, In x, Const<int32_t, 1> m, int shift, Const<int32_t, 1> b, Out y, int threads) {
  const Kind kind = kind_of(x);
  require(kind_of(y) == Kind::i32, "the output must be int32");
  require(same_shape(x, y), "x and y must have the same shape");
  require(m.size() == b.size() && (m.size() == 1 || m.size() == x.shape(4)),
          "m and b must both have 1 number or one per channel");
  check_shift(shift);
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  affine_pixels(k, kind, x.data(), size(x, 0, 4), x.shape(4), m.data(), b.data(), m.size() > 1, shift,
                static_cast<int32_t*>(y.data()), threads);
}

void add(const std::string& isa, In a, In b, Out y, int threads) {
  require(kind_of(a) == Kind::i32 && kind_of(b) == Kind::i32 && kind_of(y) == Kind::i32, "add works on int32");
  require(same_shape(a, y, 1) && same_shape(b, y, 1), "a, b and y must have the same shape");
  const size_t steps = y.shape(0), step = size(y, 1, 5);
  require((a.shape(0) == steps || a.shape(0) == 1) && (b.shape(0) == steps || b.shape(0) == 1),
          "a and b must have as many steps as y, or 1");
  const bool repeat_a = a.shape(0) != steps, repeat_b = b.shape(0) != steps;
  const int32_t* pa = static_cast<const int32_t*>(a.data());
  const int32_t* pb = static_cast<const int32_t*>(b.data());
  int32_t* py = static_cast<int32_t*>(y.data());
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  if (!repeat_a && !repeat_b) return add_values(k, pa, pb, steps * step, py, threads);
  for (size_t t = 0; t < steps; ++t)
    add_values(k, pa + (repeat_a ? 0 : t * step), pb + (repeat_b ? 0 : t * step), step, py + t * step, threads);
}

void maxpool(const std::string& isa, In x, Pair kernel, Pair stride, Pair pad, Out y, int threads) {
  const Kind kind = kind_of(x);
  require(kind == kind_of(y), "x and y must have the same dtype");
  check_window(kernel, stride, pad);
  require(pad.first < kernel.first && pad.second < kernel.second, "padding must be less than the kernel");
  require(x.shape(2) > 0 && x.shape(3) > 0 && x.shape(2) < (1 << 24) && x.shape(3) < (1 << 24), "bad image size");
  Pool p{int(x.shape(2)), int(x.shape(3)), int(x.shape(4)), 0, 0, kernel.first, kernel.second,
         stride.first,    stride.second,   pad.first,       pad.second, kind};
  p.out_height = window_count(p.height, p.kernel_h, p.stride_h, p.pad_h);
  p.out_width = window_count(p.width, p.kernel_w, p.stride_w, p.pad_w);
  require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1) && y.shape(2) == size_t(p.out_height) &&
              y.shape(3) == size_t(p.out_width) && y.shape(4) == x.shape(4),
          "the output has the wrong shape");
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  maxpool_images(k, p, x.data(), size(x, 0, 2), y.data(), threads);
}

void attention(const std::string& isa, In q, In k, In v, int heads, int m, int shift, Out y, int threads) {
  require(kind_of(q) == Kind::u8 && kind_of(k) == Kind::u8 && kind_of(v) == Kind::u8, "q, k and v must be uint8");
  require(kind_of(y) == Kind::i32, "the output must be int32");
  require(same_shape(q, y, 1) && same_shape(k, y, 1) && same_shape(v, y, 1), "q, k, v and y must have the same shape");
  require(heads > 0 && y.shape(4) % heads == 0, "heads must divide the channels");
  check_shift(shift);
  const size_t steps = y.shape(0), step = size(y, 1, 5);
  for (const In* x : {&q, &k, &v}) require(x->shape(0) == steps || x->shape(0) == 1, "q, k, v must have 1 or S steps");
  const Attention a{int(size(y, 2, 4)), int(y.shape(4)), int(y.shape(4)) / heads, m, shift};
  const auto at = [&](const In& x, size_t t) {
    return static_cast<const uint8_t*>(x.data()) + (x.shape(0) == 1 ? 0 : t * step);
  };
  const Kernels& kernel = kernels_named(isa);
  nb::gil_scoped_release release;
  if (q.shape(0) == steps && k.shape(0) == steps && v.shape(0) == steps)
    return attention_images(kernel, a, heads, at(q, 0), at(k, 0), at(v, 0), steps * y.shape(1),
                            static_cast<int32_t*>(y.data()), threads);
  for (size_t t = 0; t < steps; ++t)
    attention_images(kernel, a, heads, at(q, t), at(k, t), at(v, t), y.shape(1),
                     static_cast<int32_t*>(y.data()) + t * step, threads);
}

void mean(const std::string& isa, In x, bool over_time, int m, Out y, int threads) {
  const Kind kind = kind_of(x);
  require(kind_of(y) == Kind::i32, "the output must be int32");
  require(y.shape(0) == (over_time ? 1 : x.shape(0)) && y.shape(1) == x.shape(1) &&
              y.shape(2) == (over_time ? x.shape(2) : 1) && y.shape(3) == (over_time ? x.shape(3) : 1) &&
              y.shape(4) == x.shape(4),
          "the output has the wrong shape");
  require(x.shape(0) > 0 && size(x, 2, 4) > 0, "there is nothing to average");
  int32_t* to = static_cast<int32_t*>(y.data());
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  if (over_time) mean_time(k, kind, x.data(), x.shape(0), size(x, 1, 5), m, to, threads);
  else mean_space(k, kind, x.data(), size(x, 0, 2), size(x, 2, 4), x.shape(4), m, to, threads);
}

void check_neuron(const In& x, const Out& y) {
  require(kind_of(x) == Kind::i32 && kind_of(y) == Kind::u8, "a neuron goes from int32 to uint8");
  require(same_shape(x, y, 1) && (x.shape(0) == 1 || x.shape(0) == y.shape(0)), "x must have 1 or S steps of y's shape");
  require(y.shape(0) > 0 && y.shape(0) < (1 << 24), "bad number of steps");
}

void lif(const std::string& isa, In x, Pair decay, Pair gain, int threshold, const std::string& reset, bool strict,
         Out y, int threads) {
  check_neuron(x, y);
  const Lif p = lif_of(decay, gain, threshold, reset, strict, int(y.shape(0)));
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  lif_steps(k, p, static_cast<const int32_t*>(x.data()), x.shape(0), size(y, 1, 5), static_cast<uint8_t*>(y.data()),
            threads);
}

void ielif(const std::string& isa, In x, int levels, Pair decay, int fraction_bits, Out y, int threads) {
  check_neuron(x, y);
  check_shift(decay.second);
  require(levels >= 1 && levels <= 255, "levels must be 1..255");
  require(fraction_bits >= 0 && fraction_bits <= 30, "fraction_bits must be 0..30");
  const IeLif p{decay.first, decay.second, levels, fraction_bits, int(y.shape(0))};
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  ielif_steps(k, p, static_cast<const int32_t*>(x.data()), x.shape(0), size(y, 1, 5), static_cast<uint8_t*>(y.data()),
              threads);
}

void lookup(const std::string& isa, In x, Const<int8_t, 2> table, Out y, int threads) {
  require(kind_of(x) == Kind::u8 && kind_of(y) == Kind::s8, "lookup goes from uint8 to int8");
  require(same_shape(x, y), "x and y must have the same shape");
  require(table.shape(0) == x.shape(4) && table.shape(1) == 256, "the table must be [C, 256]");
  const Kernels& k = kernels_named(isa);
  nb::gil_scoped_release release;
  lookup_pixels(k, static_cast<const uint8_t*>(x.data()), size(x, 0, 4), x.shape(4), table.data(),
                static_cast<int8_t*>(y.data()), threads);
}

void unpack(Const<uint8_t, 1> packed, int bits, Const<int8_t, 1> table,
            nb::ndarray<int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> codes) {
  require(bits >= 1 && bits <= 8 && table.size() == size_t(1) << bits, "the table must have one code for every field");
  require(packed.size() == (codes.size() * bits + 7) / 8, "packed has the wrong length");
  nb::gil_scoped_release release;
  unpack_codes(packed.data(), codes.size(), bits, table.data(), codes.data());
}

int64_t bound(Const<int8_t, 4> weight, Const<int64_t, 1> largest, int groups) {
  require(groups > 0 && weight.shape(0) % groups == 0 && largest.size() == weight.shape(3) * groups && weight.size() > 0,
          "largest must have one number per input channel");
  for (size_t c = 0; c < largest.size(); ++c)
    require(largest.data()[c] >= 0 && largest.data()[c] <= 1 << 15, "the largest code of a channel must be 0..2^15");
  nb::gil_scoped_release release;
  return accumulator_bound(weight.data(), weight.shape(0), weight.shape(1) * weight.shape(2), weight.shape(3), groups,
                           largest.data());
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names.push_back((*k)->name);
  return names;
}

}  // namespace
}  // namespace bitspike

namespace bitspike {
void bind_plan(nb::module_&);  // bind_plan.cc
void bind_kernels(nb::module_&);  // bind_kernels.cc
}

NB_MODULE(_kernels, m) {
  using namespace bitspike;
  m.doc() = "Integer kernels; see csrc/kernels.h. Use bitspike.deploy.kernels, which adds the numpy definitions.";
  bind_plan(m);
  bind_kernels(m);
  m.def("unpack", &unpack, "packed"_a.noconvert(), "bits"_a, "table"_a.noconvert(), "codes"_a.noconvert());
  m.def("bound", &bound, "weight"_a.noconvert(), "largest"_a.noconvert(), "groups"_a);
  m.def("available", &available, "Names of the kernel sets this CPU can run, best last.");
  // noconvert: a wrong dtype is an error, never a silent copy (and a copy of y would lose the result).
  const auto x = "x"_a.noconvert(), y = "y"_a.noconvert();
  nb::class_<PreparedConv>(m, "Conv")
      .def(nb::init<const std::string&, Const<int8_t, 4>, Pair, Pair, int, Const<int16_t, 1>, Const<int32_t, 1>, int,
                    Const<int32_t, 1>, bool>(),
           "isa"_a, "weight"_a.noconvert(), "stride"_a, "padding"_a, "groups"_a, "pad_value"_a.noconvert(),
           "m"_a.noconvert(), "s"_a, "b"_a.noconvert(), "signed"_a)
      .def("__call__", &PreparedConv::operator(), x, y, "threads"_a);
  m.def("quantize", &quantize, "isa"_a, x, "m"_a.noconvert(), "s"_a, "lo"_a, "hi"_a, y, "threads"_a);
  m.def("affine", &affine, "isa"_a, x, "m"_a.noconvert(), "s"_a, "b"_a.noconvert(), y, "threads"_a);
  m.def("add", &add, "isa"_a, "a"_a.noconvert(), "b"_a.noconvert(), y, "threads"_a);
  m.def("maxpool", &maxpool, "isa"_a, x, "kernel"_a, "stride"_a, "padding"_a, y, "threads"_a);
  m.def("attention", &attention, "isa"_a, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "heads"_a, "m"_a,
        "s"_a, y, "threads"_a);
  m.def("mean", &mean, "isa"_a, x, "over_time"_a, "m"_a, y, "threads"_a);
  m.def("lif", &lif, "isa"_a, x, "decay"_a, "gain"_a, "threshold"_a, "reset"_a, "strict"_a, y, "threads"_a);
  m.def("ielif", &ielif, "isa"_a, x, "levels"_a, "decay"_a, "fraction_bits"_a, y, "threads"_a);
  m.def("lookup", &lookup, "isa"_a, x, "table"_a.noconvert(), y, "threads"_a);
}
