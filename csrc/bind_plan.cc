// bitspike.deploy._kernels.Plan: what deploy/plan.py builds a program with. Checks, keeps the arrays alive, and calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "plan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitspike {
namespace {

template <class T, size_t N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Numbers = Array<int32_t, 1>;
using Quantize = std::tuple<int, Numbers, int, int, int>;  // value, m, s, lo, hi
using ScaledCodes = std::tuple<int, int, int, int>;        // m, s, b, hi

std::vector<int32_t> copy(const Numbers& x) { return {x.data(), x.data() + x.size()}; }

class Builder {
 public:
  explicit Builder(const std::string& isa) : kernels_(kernels_named(isa)), plan_(kernels_) {}

  int value(const std::string& kind, const std::string& where, Pair steps_channels, Pair size, size_t offset) {
    using Where = Value::Where;
    require(kind == "u8" || kind == "s8" || kind == "i32", "kind must be 'u8', 's8' or 'i32'");
    require(where == "pixels" || where == "arena" || where == "tile", "where must be 'pixels', 'arena' or 'tile'");
    require(steps_channels.first > 0 && steps_channels.second > 0 && size.first > 0 && size.second > 0 && offset % 64 == 0,
            "a value needs a positive shape, and an offset that is a multiple of 64");
    const Kind k = kind == "u8" ? Kind::u8 : kind == "s8" ? Kind::s8 : Kind::i32;
    const Where w = where == "pixels" ? Where::pixels : where == "arena" ? Where::arena : Where::tile;
    ++values_;
    return plan_.value({w, k, steps_channels.first, size.first, size.second, steps_channels.second, offset});
  }

  int stage(Pair size, int parts) {
    require(size.first > 0 && size.second > 0 && parts >= 0, "bad stage");
    stage_ = true;
    return plan_.stage(size.first, size.second, parts);
  }

  void conv(int x, Array<int8_t, 4> weight, Pair stride, Pair padding, int groups, Array<int16_t, 1> pad_value, Numbers m,
            int shift, Numbers b, Pair range, int residual, int out, std::vector<Quantize> codes, ScaledCodes scaled) {
    const Value& v = at(x);
    require(v.kind != Kind::i32 && v.where != Value::Where::tile, "a convolution reads whole images of codes");
    const size_t outputs = weight.shape(0);
    require(weight.size() > 0 && groups > 0 && outputs % groups == 0 && weight.shape(3) * groups == size_t(v.channels) &&
                pad_value.size() == size_t(v.channels) && m.size() == outputs && b.size() == outputs,
            "the arrays of a convolution do not fit each other");
    require(stride.first > 0 && stride.second > 0 && padding.first >= 0 && padding.second >= 0 && shift >= 0 && shift <= 62,
            "bad stride, padding or shift");
    Conv c{};
    c.channels = v.channels, c.outputs = int(outputs);
    c.kernel_h = int(weight.shape(1)), c.kernel_w = int(weight.shape(2));
    c.stride_h = stride.first, c.stride_w = stride.second, c.pad_h = padding.first, c.pad_w = padding.second;
    c.groups = groups, c.kind = v.kind, c.lo = range.first, c.hi = range.second, c.shift = shift;
    c.weight = weight.data(), c.pad_value = pad_value.data(), c.m = m.data(), c.b = b.data();
    keep_.push_back(nb::cast(weight)), keep_.push_back(nb::cast(pad_value));
    keep_.push_back(nb::cast(m)), keep_.push_back(nb::cast(b));
    plan_.conv(x, c, finish_of(residual, out, codes, int(outputs), scaled));
  }

  void finish(int x, int residual, int out, std::vector<Quantize> codes) {
    require(at(x).kind == Kind::i32, "finish reads potentials");
    plan_.finish(x, finish_of(residual, out, codes, at(x).channels));
  }

  void affine(int x, Numbers m, Numbers b, int shift, int y) {
    same(x, y, Kind::i32);
    require(m.size() == b.size() && (m.size() == 1 || m.size() == size_t(at(x).channels)) && shift >= 0 && shift <= 62,
            "bad m, b or shift");
    plan_.affine(x, copy(m), copy(b), shift, y);
  }

  void lookup(int x, Array<int8_t, 2> table, int y) {
    same(x, y, Kind::s8);
    require(at(x).kind == Kind::u8 && table.shape(0) == size_t(at(x).channels) && table.shape(1) == 256, "bad table");
    keep_.push_back(nb::cast(table));
    plan_.lookup(x, table.data(), y);
  }

  void lif(int x, Pair decay, Pair gain, int threshold, const std::string& reset, bool strict, int y) {
    require(at(x).kind == Kind::i32, "a neuron reads potentials");
    same(x, y, Kind::u8);
    plan_.lif(x, lif_of(decay, gain, threshold, reset, strict, at(y).steps), y);
  }

  void lif_packed(int x, Pair decay, Pair gain, int threshold, const std::string& reset, bool strict, int amount,
                  Numbers table, int y) {
    require(at(x).kind == Kind::i32, "a neuron reads potentials");
    same(x, y, Kind::u8);
    plan_.lif_packed(x, {lif_of(decay, gain, threshold, reset, strict, at(y).steps), amount, nullptr, 0, nullptr}, copy(table), y);
  }

  void attention_map(int a, int b, bool over_channels, int heads, int m, int shift, int y) {
    const Value &va = at(a), &vb = at(b), &vy = at(y);
    require(heads > 0 && va.channels % heads == 0 && vb.channels == va.channels && vb.positions() == va.positions(), "bad map");
    const size_t side = over_channels ? va.positions() : va.channels / heads;
    require(va.kind == Kind::u8 && vb.kind == Kind::u8 && vy.kind == Kind::i32 && size_t(vy.height) == side &&
                vy.width == heads && size_t(vy.channels) == side && whole(a) && whole(b) && shift >= 0 && shift <= 62,
            "bad values of a map");
    plan_.attention_map(a, b, over_channels, heads, m, shift, y);
  }

  void attention_read(int chosen, int x, bool over_tokens, int heads, Numbers m, int shift, int y) {
    const Value &vc = at(chosen), &vx = at(x), &vy = at(y);
    require(heads > 0 && vx.channels % heads == 0 && vy.channels == vx.channels && vy.positions() == vx.positions(), "bad read");
    const size_t side = over_tokens ? vx.positions() : vx.channels / heads;
    require(vc.kind == Kind::u8 && vx.kind == Kind::u8 && vy.kind == Kind::i32 && size_t(vc.height) == side &&
                vc.width == heads && size_t(vc.channels) == side && whole(chosen) && whole(x) && shift >= 0 && shift <= 62 &&
                (m.size() == size_t(heads) || m.size() == size_t(heads) * vy.steps),
            "bad values of a reading");
    plan_.attention_read(chosen, x, over_tokens, heads, copy(m), shift, y);
  }

  void coincidences(int k, int v, int m, int shift, int y) {
    const Value &vk = at(k), &vv = at(v), &vy = at(y);
    require(vk.kind == Kind::u8 && vv.kind == Kind::u8 && vy.kind == Kind::i32 && vy.positions() == 1 &&
                vk.channels == vv.channels && vk.channels == vy.channels && vk.positions() == vv.positions() && whole(k) &&
                whole(v) && shift >= 0 && shift <= 62,
            "bad values of coincidences");
    plan_.coincidences(k, v, m, shift, y);
  }

  void add_codes(int a, int b, int y) {
    same(a, y, Kind::u8);
    same(b, y, Kind::u8);
    plan_.add_codes(a, b, y);
  }

  void mask_codes(int q, int chosen, int y) {
    same(q, y, Kind::u8);
    require(at(chosen).kind == Kind::u8 && at(chosen).positions() == 1 && at(chosen).channels == at(q).channels &&
                whole(chosen),
            "bad values of a mask");
    plan_.mask_codes(q, chosen, y);
  }

  void ielif(int x, int levels, Pair decay, int fraction_bits, int y) {
    require(at(x).kind == Kind::i32, "a neuron reads potentials");
    same(x, y, Kind::u8);
    plan_.ielif(x, {decay.first, decay.second, levels, fraction_bits, at(y).steps}, y);
  }

  void mean_time(int x, int m, int y) {
    require(at(y).kind == Kind::i32 && at(y).steps == 1 && at(x).channels == at(y).channels, "bad values of a mean");
    plan_.mean_time(x, m, y);
  }

  void mean_space(int x, int m, int y) {
    require(at(y).kind == Kind::i32 && at(y).steps == at(x).steps && at(x).channels == at(y).channels &&
                at(y).positions() == 1 && at(x).where != Value::Where::tile,
            "bad values of a mean");
    plan_.mean_space(x, m, y);
  }

  void maxpool(int x, Pair kernel, Pair stride, Pair padding, int y) {
    const Value &a = at(x), &b = at(y);
    require(a.kind == b.kind && a.steps == b.steps && a.channels == b.channels && a.where != Value::Where::tile,
            "bad values of a pooling");
    require(padding.first < kernel.first && padding.second < kernel.second, "padding must be less than the kernel");
    plan_.maxpool(x, {a.height, a.width, a.channels, b.height, b.width, kernel.first, kernel.second, stride.first,
                      stride.second, padding.first, padding.second, a.kind},
                  y);
  }

  void upsample(int x, bool bilinear, int factor, int y) {
    const Value &a = at(x), &b = at(y);
    require(factor > 0 && factor <= 1024 && a.kind == b.kind && a.steps == b.steps && a.channels == b.channels &&
                a.where != Value::Where::tile && b.height == factor * a.height && b.width == factor * a.width,
            "bad values of an upsampling");
    require(!bilinear || (a.kind == Kind::i32 && (factor & (factor - 1)) == 0),
            "bilinear is for potentials and powers of two");
    plan_.upsample(x, bilinear, factor, y);
  }

  void attention(int q, int k, int v, int heads, int m, int shift, int y) {
    for (const int i : {q, k, v, y})
      require(at(i).where != Value::Where::tile && at(i).channels == at(y).channels &&
                  at(i).positions() == at(y).positions() && at(i).kind == (i == y ? Kind::i32 : Kind::u8),
              "bad values of an attention");
    require(heads > 0 && at(y).channels % heads == 0, "heads must divide the channels");
    plan_.attention(q, k, v, heads, m, shift, y);
  }

  void done(int output, float scale, size_t arena_bytes) {
    require(at(output).kind == Kind::i32 && at(output).where == Value::Where::arena && at(output).steps == 1,
            "the output must be potentials in the arena");
    for (int i = 0; i < values_; ++i) {
      const Value& v = at(i);
      require(v.where != Value::Where::arena ||
                  v.offset + v.steps * v.positions() * v.position_bytes() <= arena_bytes, "a value lies outside the arena");
    }
    plan_.done(output, scale, arena_bytes);
  }

  using Pixels = nb::ndarray<const uint8_t, nb::ndim<5>, nb::c_contig, nb::device::cpu>;
  using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Seconds = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Arena = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

  void run(Pixels x, Logits y, int threads, Seconds seconds) {
    const size_t images = checked(x, threads);
    require(y.shape(0) == images, "as many rows of logits as images are needed");
    double* to = times(seconds);
    nb::gil_scoped_release release;
    plan_.run(x.data(), images, y.data(), threads, to);
  }

  void run_part(Pixels x, Arena arena, int first, int last, int threads, Seconds seconds) {
    const size_t images = checked(x, threads);
    require(arena.size() >= images * plan_.arena_bytes(), "the arena is too small");
    require(0 <= first && first <= last && last <= plan_.stages(), "no such stages");
    double* to = times(seconds);
    nb::gil_scoped_release release;
    plan_.run_part(x.data(), images, reinterpret_cast<char*>(arena.data()), first, last, threads, to);
  }

  nb::list layers() {
    nb::list list;
    for (const Plan::Layer& l : plan_.layers()) {
      nb::list able;
      for (int v = 0; v < kVariants; ++v)
        if (l.able[v]) able.append(variant_name(static_cast<Variant>(v)));
      nb::dict d;
      d["stage"] = l.stage, d["variant"] = variant_name(l.variant), d["able"] = able;
      d["summed"] = l.summed, d["by_bits"] = l.by_bits;
      d["density"] = l.density < 0 ? nb::none() : nb::object(nb::float_(l.density));
      d["load"] = l.load < 0 ? nb::none() : nb::object(nb::float_(l.load));
      list.append(d);
    }
    return list;
  }

  void force(int layer, const std::string& variant) {
    const std::vector<Plan::Layer> layers = plan_.layers();
    require(0 <= layer && layer < int(layers.size()), "no such layer");
    if (variant.empty()) return plan_.force(layer, -1);
    for (int v = 0; v < kVariants; ++v)
      if (layers[layer].able[v] && variant == variant_name(static_cast<Variant>(v))) return plan_.force(layer, v);
    throw nb::value_error("this layer has no such variant");
  }

  size_t packed_bytes() const { return plan_.packed_bytes(); }

 private:
  bool whole(int i) const { return at(i).where != Value::Where::tile; }

  const Value& at(int i) const {
    require(0 <= i && i < values_, "no such value");
    return plan_.at(i);
  }

  // y may have more steps than x: one step is repeated.
  void same(int x, int y, Kind kind) const {
    const Value &a = at(x), &b = at(y);
    require(a.height == b.height && a.width == b.width && a.channels == b.channels && b.kind == kind &&
                (a.steps == b.steps || a.steps == 1),
            "x and y must have the same shape, and y another kind");
  }

  // A residual of codes is for convolutions: only those get numbers to multiply it with.
  Finish finish_of(int residual, int out, const std::vector<Quantize>& codes, int channels, ScaledCodes scaled = {0, 0, 0, -1}) const {
    require(codes.size() <= 2, "at most two quantizers");
    Finish f;
    f.residual = residual, f.out = out;
    const auto [m, shift, b, hi] = scaled;
    f.scaled = {m, b, shift, hi};
    const Kind kind = residual == -1 || hi < 0 ? Kind::i32 : Kind::u8;
    require(residual == -1 || (at(residual).kind == kind && at(residual).channels == channels && shift >= 0 && shift <= 62),
            "bad residual");
    require(out == -1 || (at(out).kind == Kind::i32 && at(out).channels == channels), "bad potentials");
    for (const Quantize& q : codes) {
      const auto& [value, m, shift, lo, hi] = q;
      const bool is_signed = at(value).kind == Kind::s8;
      require(at(value).kind != Kind::i32 && at(value).channels == channels && shift >= 0 && shift <= 62 && lo <= hi &&
                  (m.size() == 1 || m.size() == size_t(channels)) && lo >= (is_signed ? -128 : 0) &&
                  hi <= (is_signed ? 127 : 255),
              "bad quantizer");
      f.codes.push_back({value, copy(m), shift, lo, hi});
    }
    return f;
  }

  size_t checked(const Pixels& x, int threads) const {
    const Value& v = at(0);
    require(threads >= 1 && threads <= 1024, "threads must be 1..1024");
    require(x.shape(0) == size_t(v.steps) && x.shape(2) == size_t(v.height) && x.shape(3) == size_t(v.width) &&
                x.shape(4) == size_t(v.channels),
            "the pixels have the wrong shape");
    return x.shape(1);
  }

  double* times(const Seconds& seconds) const {
    if (seconds.size() == 0) return nullptr;
    require(seconds.size() == size_t(plan_.stages()), "one number per stage is needed");
    return seconds.data();
  }

  const Kernels& kernels_;
  Plan plan_;
  std::vector<nb::object> keep_;
  int values_ = 0;
  bool stage_ = false;
};

}  // namespace

void bind_plan(nb::module_& m) {
  const auto values = "codes"_a;
  nb::class_<Builder>(m, "Plan", "A program laid out for one set of kernels; see csrc/plan.h.")
      .def(nb::init<const std::string&>(), "isa"_a)
      .def("value", &Builder::value, "kind"_a, "where"_a, "steps_channels"_a, "size"_a, "offset"_a)
      .def("stage", &Builder::stage, "size"_a, "parts"_a)
      .def("conv", &Builder::conv, "x"_a, "weight"_a.noconvert(), "stride"_a, "padding"_a, "groups"_a,
           "pad_value"_a.noconvert(), "m"_a.noconvert(), "s"_a, "b"_a.noconvert(), "range"_a, "residual"_a, "out"_a, values,
           "scaled"_a = ScaledCodes{0, 0, 0, -1})
      .def("finish", &Builder::finish, "x"_a, "residual"_a, "out"_a, values)
      .def("affine", &Builder::affine, "x"_a, "m"_a.noconvert(), "b"_a.noconvert(), "s"_a, "y"_a)
      .def("lookup", &Builder::lookup, "x"_a, "table"_a.noconvert(), "y"_a)
      .def("lif", &Builder::lif, "x"_a, "decay"_a, "gain"_a, "threshold"_a, "reset"_a, "strict"_a, "y"_a)
      .def("lif_packed", &Builder::lif_packed, "x"_a, "decay"_a, "gain"_a, "threshold"_a, "reset"_a, "strict"_a, "amount"_a,
           "table"_a, "y"_a)
      .def("attention_map", &Builder::attention_map, "a"_a, "b"_a, "over_channels"_a, "heads"_a, "m"_a, "s"_a, "y"_a)
      .def("attention_read", &Builder::attention_read, "chosen"_a, "x"_a, "over_tokens"_a, "heads"_a, "m"_a, "s"_a, "y"_a)
      .def("coincidences", &Builder::coincidences, "k"_a, "v"_a, "m"_a, "s"_a, "y"_a)
      .def("add_codes", &Builder::add_codes, "a"_a, "b"_a, "y"_a)
      .def("mask_codes", &Builder::mask_codes, "q"_a, "chosen"_a, "y"_a)
      .def("ielif", &Builder::ielif, "x"_a, "levels"_a, "decay"_a, "fraction_bits"_a, "y"_a)
      .def("mean_time", &Builder::mean_time, "x"_a, "m"_a, "y"_a)
      .def("mean_space", &Builder::mean_space, "x"_a, "m"_a, "y"_a)
      .def("maxpool", &Builder::maxpool, "x"_a, "kernel"_a, "stride"_a, "padding"_a, "y"_a)
      .def("upsample", &Builder::upsample, "x"_a, "bilinear"_a, "factor"_a, "y"_a)
      .def("attention", &Builder::attention, "q"_a, "k"_a, "v"_a, "heads"_a, "m"_a, "s"_a, "y"_a)
      .def("done", &Builder::done, "output"_a, "scale"_a, "arena_bytes"_a)
      .def("run", &Builder::run, "pixels"_a.noconvert(), "logits"_a.noconvert(), "threads"_a, "seconds"_a.noconvert())
      .def("run_part", &Builder::run_part, "pixels"_a.noconvert(), "arena"_a.noconvert(), "first"_a, "last"_a, "threads"_a,
           "seconds"_a.noconvert())
      .def("layers", &Builder::layers)
      .def("force", &Builder::force, "layer"_a, "variant"_a)
      .def_prop_ro("packed_bytes", &Builder::packed_bytes);
}

}  // namespace bitspike
