// Single kernels for Python: every variant of a convolution on one image with its epilogue, and the speed of the machine's
// bare instructions. For tests and benchmarks; networks run through bind_plan.cc.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"
#include "direct.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitspike {
namespace {

template <class T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
// m (one number or one per channel), s, lo, hi, codes [H, W, C]
using Codes = std::tuple<In<int32_t, 1>, int, int, int, Out<uint8_t, 3>>;

// Pointers of an epilogue on `rows` x `channels` numbers; nonzero must outlive it.
Epilogue make_epilogue(size_t size, size_t channels, const std::optional<In<int32_t, 3>>& residual,
                       const std::optional<Out<int32_t, 3>>& out, const std::vector<Codes>& codes, size_t* nonzero) {
  Epilogue e{};
  require(codes.size() <= 2, "at most two quantizers");
  if (residual) require(residual->size() == size, "the residual has the wrong size"), e.residual = residual->data();
  if (out) require(out->size() == size, "the output has the wrong size"), e.out = out->data();
  for (size_t k = 0; k < codes.size(); ++k) {
    const auto& [m, shift, lo, hi, to] = codes[k];
    require(m.size() == 1 || m.size() == channels, "m must have 1 number or one per channel");
    require(to.size() == size, "the codes have the wrong size");
    require(shift >= 0 && shift <= 62 && lo <= hi && lo >= -128 && hi <= 255 && (lo >= 0 || hi <= 127), "bad quantizer");
    e.quantizer[k] = {m.data(), m.size() > 1, shift, lo, hi};
    e.codes[k] = to.data();
    e.nonzero[k] = nonzero + k;
  }
  return e;
}

class OneConv {
 public:
  OneConv(const std::string& isa, const std::string& variant, Pair size, In<int8_t, 4> weight, Pair stride, Pair pad,
          int groups, In<int16_t, 1> pad_value, In<int32_t, 1> m, int shift, In<int32_t, 1> b, Pair range)
      : pad_value_(pad_value.data(), pad_value.data() + pad_value.size()) {
    require(weight.size() > 0 && groups > 0 && weight.shape(0) % groups == 0, "bad weights or groups");
    require(stride.first > 0 && stride.second > 0 && pad.first >= 0 && pad.second >= 0, "bad stride or padding");
    require(m.size() == weight.shape(0) && b.size() == m.size(), "m and b must have one number per output");
    require(pad_value.size() == weight.shape(3) * groups, "pad_value must have one number per channel");
    require(shift >= 0 && shift <= 62, "shifts must be 0..62");
    const auto [lo, hi] = range;
    require(lo <= hi && ((lo >= 0 && hi <= 255) || (lo >= -128 && hi <= 127)), "bad range of codes");
    for (const int16_t p : pad_value_) require(p >= lo && p <= hi, "pad_value must lie in the range of the codes");
    Conv& c = conv_;
    c.height = size.first, c.width = size.second, c.channels = int(pad_value.size()), c.outputs = int(weight.shape(0));
    c.kernel_h = int(weight.shape(1)), c.kernel_w = int(weight.shape(2));
    c.stride_h = stride.first, c.stride_w = stride.second, c.pad_h = pad.first, c.pad_w = pad.second;
    require(c.height > 0 && c.width > 0 && c.height + 2 * c.pad_h >= c.kernel_h && c.width + 2 * c.pad_w >= c.kernel_w,
            "the kernel is larger than the padded image");
    c.out_height = (c.height + 2 * c.pad_h - c.kernel_h) / c.stride_h + 1;
    c.out_width = (c.width + 2 * c.pad_w - c.kernel_w) / c.stride_w + 1;
    c.groups = groups, c.kind = lo < 0 ? Kind::s8 : Kind::u8, c.lo = lo, c.hi = hi, c.shift = shift;
    c.weight = weight.data(), c.m = m.data(), c.b = b.data(), c.pad_value = pad_value_.data();
    describe_weights(c);
    const Kernels& k = kernels_named(isa);
    kernel_ = nullptr;
    for (int v = 0; v < kVariants; ++v)
      if (variant == variant_name(static_cast<Variant>(v))) kernel_ = &k.conv[v];
    require(kernel_, "no such variant");
    supported_ = kernel_->run && kernel_->supported(c);
    if (supported_) kernel_->pack(c, packed_.get(packed_bytes_ = kernel_->packed_bytes(c)));
    direct_able_ = k.direct;
    weight_.assign(weight.data(), weight.data() + weight.size());
    m_.assign(m.data(), m.data() + m.size()), b_.assign(b.data(), b.data() + b.size());
    c.weight = weight_.data(), c.m = m_.data(), c.b = b_.data();
  }

  bool supported() const { return supported_; }
  size_t packed_bytes() const { return packed_bytes_; }
  Pair out_size() const { return {conv_.out_height, conv_.out_width}; }

  // Output rows of one image; returns how many of each quantizer's codes are not 0.
  std::vector<size_t> operator()(nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu> x, Pair rows,
                                 std::optional<In<int32_t, 3>> residual, std::optional<Out<int32_t, 3>> out,
                                 std::vector<Codes> codes) {
    const Conv& c = conv_;
    require(supported_, "this variant does not support the convolution");
    require(x.dtype() == (c.kind == Kind::s8 ? nb::dtype<int8_t>() : nb::dtype<uint8_t>()), "wrong dtype of codes");
    require(x.shape(0) == size_t(c.height) && x.shape(1) == size_t(c.width) && x.shape(2) == size_t(c.channels),
            "wrong shape of codes");
    const auto [row0, row1] = rows;
    require(row0 >= 0 && row0 < row1 && row1 <= c.out_height, "bad rows");
    size_t nonzero[2] = {};
    Epilogue e = make_epilogue(size_t(row1 - row0) * c.out_width * c.outputs, c.outputs, residual, out, codes, nonzero);
    if (!residual && !out && codes.size() == 1) e.direct = direct(e.quantizer[0]);
    int64_t largest = c.largest;
    for (size_t i = 0; residual && i < residual->size(); ++i) largest = std::max(largest, c.largest + std::abs(int64_t{residual->data()[i]}));
    e.fits = largest <= INT32_MAX;
    void* scratch = scratch_.get(kernel_->scratch_bytes(c, row1 - row0));
    {
      nb::gil_scoped_release release;
      kernel_->run(c, packed_.get(0), x.data(), row0, row1, e, scratch);
    }
    return {nonzero, nonzero + codes.size()};
  }

  const char* codes_by() const {  // the last call
    const Direct* d = direct_.get();
    if (!d) return "definition";
    return d->scale ? d->code_scale ? "potentials and codes in floats" : "floats" : d->m ? "integers" : "codes in floats";
  }

 private:
  const Direct* direct(const Quantizer& q) {  // what it was made for is kept: making it takes longer than a small image
    const std::vector<int32_t> key = [&] {
      std::vector<int32_t> numbers(q.m, q.m + (q.per_channel ? conv_.outputs : 1));
      numbers.insert(numbers.end(), {q.shift, q.lo, q.hi});
      return numbers;
    }();
    if (direct_able_ && key != direct_for_) direct_ = DirectCodes(conv_, q), direct_for_ = key;
    return direct_.get();
  }

  std::vector<int16_t> pad_value_;
  std::vector<int8_t> weight_;
  std::vector<int32_t> m_, b_, direct_for_;
  DirectCodes direct_;
  Conv conv_{};
  const ConvKernel* kernel_;
  bool supported_, direct_able_;
  size_t packed_bytes_ = 0;
  Memory packed_, scratch_;
};

std::vector<size_t> finish(const std::string& isa, In<int32_t, 3> x, std::optional<In<int32_t, 3>> residual,
                           std::optional<Out<int32_t, 3>> out, std::vector<Codes> codes) {
  size_t nonzero[2] = {};
  const Epilogue e = make_epilogue(x.size(), x.shape(2), residual, out, codes, nonzero);
  kernels_named(isa).finish(x.data(), x.shape(0) * x.shape(1), x.shape(2), e);
  return {nonzero, nonzero + codes.size()};
}

using Codes2 = In<uint8_t, 2>;

// a, b: [tokens, heads * width]; y: rows [row0, row1) of the map, [rows, heads * side].
void attention_map(const std::string& isa, bool over_channels, Codes2 a, Codes2 b, int heads, Pair rows, int m, int shift,
                   Out<int32_t, 2> y) {
  require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1) && heads > 0 && a.shape(1) % heads == 0, "bad operands");
  check_shift(shift);
  const Heads s{a.shape(0), size_t(heads), a.shape(1) / heads};
  const size_t side = over_channels ? s.tokens : s.width;
  require(rows.first >= 0 && rows.first < rows.second && size_t(rows.second) <= side, "bad rows");
  require(y.shape(0) == size_t(rows.second - rows.first) && y.shape(1) == side * heads, "the output has the wrong shape");
  const MapKernel& k = kernels_named(isa).maps;
  Memory scratch;
  k.map(s, over_channels, a.data(), b.data(), rows.first, rows.second, m, shift, y.data(),
        scratch.get(k.map_scratch_bytes(s, over_channels, y.shape(0))));
}

// chosen: [side, heads * side]; x: [tokens, heads * width]; m: one per head; y: tokens [first, first + rows of y).
void attention_read(const std::string& isa, bool over_tokens, Codes2 chosen, Codes2 x, int heads, int first,
                    In<int32_t, 1> m, int shift, Out<int32_t, 2> y) {
  require(heads > 0 && x.shape(1) % heads == 0 && m.size() == size_t(heads), "bad heads");
  check_shift(shift);
  const Heads s{x.shape(0), size_t(heads), x.shape(1) / heads};
  const size_t side = over_tokens ? s.tokens : s.width;
  require(chosen.shape(0) == side && chosen.shape(1) == side * heads, "the map has the wrong shape");
  require(first >= 0 && y.shape(0) > 0 && first + y.shape(0) <= s.tokens && y.shape(1) == x.shape(1),
          "the output has the wrong shape");
  const MapKernel& k = kernels_named(isa).maps;
  Memory scratch;
  k.read(s, over_tokens, chosen.data(), x.data(), first, y.shape(0), m.data(), shift, y.data(),
         scratch.get(k.read_scratch_bytes(s, over_tokens, y.shape(0))));
}

// x: [steps or 1, n]; table: empty for none; y: [steps, n]. Returns how many buckets the table has.
size_t lif_packed(const std::string& isa, In<int32_t, 2> x, Pair decay, Pair gain, int threshold, const std::string& reset,
                  bool strict, int amount, In<int32_t, 1> table, Out<uint8_t, 2> y) {
  require((x.shape(0) == 1 || x.shape(0) == y.shape(0)) && x.shape(1) == y.shape(1) && x.size() > 0, "bad shapes");
  PackedLif p{lif_of(decay, gain, threshold, reset, strict, int(y.shape(0))), amount, nullptr, 0, nullptr};
  if (table.size() > 0) p.table = table.data(), p.entries = int(table.size());
  std::vector<uint32_t> words(make_buckets(p.table, p.entries, nullptr, nullptr));
  Buckets buckets;
  if (!words.empty()) make_buckets(p.table, p.entries, words.data(), &buckets), p.buckets = &buckets;
  kernels_named(isa).lif_packed(p, x.data(), x.shape(1), x.shape(0) == 1 ? 0 : x.shape(1), y.data(), y.shape(1));
  return words.size();
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<OneConv>(m, "OneConv", "One variant of one convolution on one image; see csrc/kernels.h.")
      .def(nb::init<const std::string&, const std::string&, Pair, In<int8_t, 4>, Pair, Pair, int, In<int16_t, 1>,
                    In<int32_t, 1>, int, In<int32_t, 1>, Pair>(),
           "isa"_a, "variant"_a, "size"_a, "weight"_a.noconvert(), "stride"_a, "padding"_a, "groups"_a,
           "pad_value"_a.noconvert(), "m"_a.noconvert(), "s"_a, "b"_a.noconvert(), "range"_a)
      .def_prop_ro("supported", &OneConv::supported)
      .def_prop_ro("packed_bytes", &OneConv::packed_bytes)
      .def_prop_ro("out_size", &OneConv::out_size)
      .def_prop_ro("codes_by", &OneConv::codes_by, "What Epilogue::direct had for the codes of the last call.")
      .def("__call__", &OneConv::operator(), "x"_a.noconvert(), "rows"_a, "residual"_a.noconvert().none(),
           "out"_a.noconvert().none(), "codes"_a);
  m.def("finish", &finish, "isa"_a, "x"_a.noconvert(), "residual"_a.noconvert().none(), "out"_a.noconvert().none(),
        "codes"_a);
  m.def("attention_map", &attention_map, "isa"_a, "over_channels"_a, "a"_a.noconvert(), "b"_a.noconvert(), "heads"_a,
        "rows"_a, "m"_a, "s"_a, "y"_a.noconvert());
  m.def("attention_read", &attention_read, "isa"_a, "over_tokens"_a, "chosen"_a.noconvert(), "x"_a.noconvert(), "heads"_a,
        "first"_a, "m"_a.noconvert(), "s"_a, "y"_a.noconvert());
  m.def("lif_packed", &lif_packed, "isa"_a, "x"_a.noconvert(), "decay"_a, "gain"_a, "threshold"_a, "reset"_a, "strict"_a,
        "amount"_a, "table"_a.noconvert(), "y"_a.noconvert());
  m.def("variants", [] {
    std::vector<std::string> names;
    for (int v = 0; v < kVariants; ++v) names.push_back(variant_name(static_cast<Variant>(v)));
    return names;
  });
  m.def(
      "spin_macs",
      [](const std::string& isa, const std::string& what, double seconds) {
        const Kernels& k = kernels_named(isa);
        require(k.spin, "this set has no such measurement");
        const Spin kind = what == "popcount" ? Spin::popcount : what == "add"     ? Spin::add
                          : what == "carry"  ? Spin::carry
                          : what == "matrix" ? Spin::matrix
                                             : Spin::dot;
        using Clock = std::chrono::steady_clock;
        double best = 0;
        for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end;) {
          const auto start = Clock::now();
          const double macs = k.spin(kind, 20000);
          const double rate = macs / std::chrono::duration<double>(Clock::now() - start).count();
          if (rate > best) best = rate;
        }
        return best;
      },
      "isa"_a, "what"_a, "seconds"_a,
      "Multiply-accumulates a second of bare instructions in registers: the machine's bound for 'dot', 'popcount', 'add', 'carry', 'matrix'.");
}

}  // namespace bitspike
