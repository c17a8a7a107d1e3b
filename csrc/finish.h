// What happens to potentials while they are in registers: residual, output, codes (see Epilogue in kernels.h), written
// over the primitives `V` of tiles.h. A quantizer is brought into the cheapest form that is exact:
//
//   rounded one positive m <= 2^(s-1), few codes, where the set has floats: a fused product, rounded, makes the same code
//   small   one positive m <= 2^(s-1): x is clipped to where the code still changes, so 32-bit products suffice
//   steps   one positive m, at most kMostSteps codes above the lowest: how many limits x is above
//   fits    |m| < 2^s: the rounded product fits into 32 bits for every x, so nothing saturates before the clip
//   any     products and saturation in 64 bits
#pragma once
#include <string.h>

#include "kernels.h"

#ifdef _MSC_VER
#define BITSPIKE_INLINE __forceinline
#define BITSPIKE_NOINLINE __declspec(noinline)
#else
#define BITSPIKE_INLINE inline __attribute__((always_inline))
#define BITSPIKE_NOINLINE __attribute__((noinline))
#endif

namespace bitspike {
namespace {

inline int at_most(int a, int b) { return a < b ? a : b; }
inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

constexpr int kMostSteps = 4, kMostRounded = 16;

template <class V>
struct QuantizeVector {
  enum class Form { rounded, small, steps, fits, any } form = Form::any;
  const int32_t* m;
  bool per_channel;
  int32_t lo, hi;
  // small: clip to first..last, times `factor` unless it is 1, plus half, shifted right by `shift`
  int32_t first = 0, last = 0, factor = 1, half = 0;
  int shift = 0;
  int32_t limit[kMostSteps];  // steps
  float times = 0, bias = 0;  // rounded
  typename V::Scale scale;
  typename V::Factor one;

  QuantizeVector(const Quantizer& q, size_t channels)
      : m(q.m), per_channel(q.per_channel), lo(q.lo), hi(q.hi), scale(q.shift), one(int64_t{q.m[0]}) {
    int64_t most = 0;
    for (size_t c = 0; c < (per_channel ? channels : 1); ++c) {
      const int64_t size = m[c] < 0 ? -int64_t{m[c]} : m[c];
      if (size > most) most = size;
    }
    if (q.shift >= 32 || most < int64_t{1} << q.shift) form = Form::fits;
    const int64_t largest = hi > -int64_t{lo} ? hi : -int64_t{lo};
    const bool fits32 = q.shift >= 1 && q.shift <= 30 && ((largest + 1) << q.shift) + 2 * most < INT32_MAX;
    if (per_channel || m[0] <= 0) return;
    if constexpr (V::kSums)
      if (q.shift >= 2 && most <= int64_t{1} << (q.shift - 1) && find_floats(q)) {
        form = Form::rounded;
        return;
      }
    if (!fits32 || most > int64_t{1} << (q.shift - 1)) {
      if (find_limits(q)) form = Form::steps;
      return;
    }
    form = Form::small;
    factor = m[0], shift = q.shift;
    while (factor % 2 == 0 && shift > 1) factor /= 2, --shift;  // rshift(x * 2m, s + 1) = rshift(x * m, s) for s > 0
    half = 1 << (shift - 1);
    const int64_t unit = int64_t{1} << shift, top = hi * unit, bottom = lo * unit;
    last = static_cast<int32_t>(top / factor + (top % factor > 0));         // ceil: its code is hi
    first = static_cast<int32_t>(bottom / factor - (bottom % factor < 0));  // floor: its code is lo
  }

  // The smallest x with code n: x * m + half >= n * 2^shift.
  int64_t least_with(const Quantizer& q, int64_t n) const {
    const int64_t one_code = int64_t{1} << q.shift, needed = n * one_code - (q.shift > 0 ? one_code / 2 : 0);
    return needed / m[0] + (needed % m[0] > 0);  // ceil
  }

  // A line that reaches n - 1/2 between the last x with code n - 1 and the first with code n, for every n. Conversion, product and rounding
  // never fall, so that it has the codes of all numbers if it has those on both sides of every boundary, which are computed.
  bool find_floats(const Quantizer& q) {
    if (q.shift > 54 || hi - lo > kMostRounded || hi > 255 || lo < -255) return false;
    const double slope = static_cast<double>(m[0]) / static_cast<double>(int64_t{1} << q.shift);
    double most = slope, least = -slope;  // of a bias
    for (int n = lo + 1; n <= hi; ++n) {
      const int64_t x = least_with(q, n);
      if (x <= INT32_MIN || x > INT32_MAX) return false;
      const double above = (n - 0.5) - slope * static_cast<double>(x), below = (n - 0.5) - slope * static_cast<double>(x - 1);
      if (above > least) least = above;
      if (below < most) most = below;
    }
    times = static_cast<float>(slope), bias = static_cast<float>((least + most) / 2);
    for (int n = lo + 1; n <= hi; ++n) {
      const int32_t x = static_cast<int32_t>(least_with(q, n));
      int32_t codes[V::kLanes];
      V::store(codes, rounded(V::splat(x)), V::kLanes);
      if (codes[0] < n) return false;
      V::store(codes, rounded(V::splat(x - 1)), V::kLanes);
      if (codes[0] >= n) return false;
    }
    return true;
  }
  typename V::I32 rounded(typename V::I32 x) const {  // before the clip
    return V::rounded(V::multiply_add(V::floats(x), V::splat_float(times), V::splat_float(bias)));
  }

  bool find_limits(const Quantizer& q) {
    if (q.shift > 54 || hi - lo > kMostSteps || hi > 255 || lo < -255) return false;
    for (int k = 0; k < kMostSteps; ++k) {
      const int64_t least = least_with(q, lo + k + 1);
      if (least <= INT32_MIN) return false;
      limit[k] = lo + k + 1 > hi || least > INT32_MAX ? INT32_MAX : static_cast<int32_t>(least - 1);
    }
    return true;
  }

  template <Form kForm>
  typename V::I32 apply(typename V::I32 x, size_t channel, int lanes) const {
    if constexpr (kForm == Form::rounded && V::kSums) return V::clip(rounded(x), lo, hi);
    if (kForm == Form::small) {
      x = V::clip(x, first, last);
      if (factor != 1) x = V::multiply(x, V::splat(factor));
      return V::shift_right(V::add(x, V::splat(half)), shift);
    }
    if (kForm == Form::steps) {
      typename V::I32 code = V::splat(lo);
      for (const int32_t l : limit) code = V::plus_one_above(code, x, V::splat(l));
      return code;
    }
    const typename V::Factor f = per_channel ? V::factor(m + channel, lanes) : one;
    if (kForm == Form::fits) return V::clip(V::requant_fits(x, f, scale), lo, hi);
    return V::clip(V::requant(x, f, V::no_bias(), scale), lo, hi);
  }

  typename V::I32 operator()(typename V::I32 x, size_t channel, int lanes) const {
    if (form == Form::rounded) return apply<Form::rounded>(x, channel, lanes);
    if (form == Form::small) return apply<Form::small>(x, channel, lanes);
    if (form == Form::steps) return apply<Form::steps>(x, channel, lanes);
    if (form == Form::fits) return apply<Form::fits>(x, channel, lanes);
    return apply<Form::any>(x, channel, lanes);
  }
};

inline const Quantizer& used_quantizer(const Epilogue& e, int k) {
  static constexpr int32_t kOne = 1;
  static constexpr Quantizer kNone = {&kOne, false, 1, 0, 1};
  return e.codes[k] ? e.quantizer[k] : kNone;
}

// What Requantize makes of sums for an epilogue. rounded: codes, by floats, which are rounded once, or twice.
enum class Made { potentials, codes, rounded, twice, sums };
constexpr bool by_floats(Made how) { return how == Made::rounded || how == Made::twice; }

// Any epilogue, after any convolution.
template <class V>
struct FinishAny {
  static constexpr bool kFits = false, kUsualCodes = false;
  static constexpr Made kMade = Made::potentials;
  const Epilogue& e;
  QuantizeVector<V> first, second;

  FinishAny(const Epilogue& epilogue, size_t channels)
      : e(epilogue), first(used_quantizer(epilogue, 0), channels), second(used_quantizer(epilogue, 1), channels) {}

  // Elements i .. i + lanes - 1, which belong to the channels from `channel` on.
  void operator()(size_t i, size_t channel, int lanes, typename V::I32 x) const {
    if (e.residual) x = V::add_saturating(x, V::load(e.residual + i, lanes));
    if (e.out) V::store(e.out + i, x, lanes);
    if (e.codes[0]) V::store_codes(e.codes[0] + i, first(x, channel, lanes), lanes);
    if (e.codes[1]) V::store_codes(e.codes[1] + i, second(x, channel, lanes), lanes);
  }
};

enum class Added { nothing, saturating, fitting };

// The usual ones, with nothing left to decide per vector. kCodes: whether there are codes, made in the given form.
template <class V, Added kAdded, bool kOut, bool kCodes, int kForm>
struct FinishUsual {
  using Quantize = QuantizeVector<V>;
  static constexpr bool kFits = true, kUsualCodes = kCodes;  // the latter: x becomes `code`, between lo() and hi()
  static constexpr Added kSum = kAdded;
  static constexpr bool kKept = kOut;
  static constexpr Made kMade = Made::potentials;
  const int32_t* residual;
  int32_t* out;
  uint8_t* codes;
  Quantize quantize;

  FinishUsual(const Epilogue& e, const Quantize& q) : residual(e.residual), out(e.out), codes(e.codes[0]), quantize(q) {}

  int lo() const { return quantize.lo; }
  int hi() const { return quantize.hi; }
  static constexpr auto kHow = static_cast<typename Quantize::Form>(kForm);
  // Of `rounded`, what `lo` and `hi` are still to clip.
  BITSPIKE_INLINE typename V::I32 code(size_t channel, int lanes, typename V::I32 x) const {
    if constexpr (kHow == Quantize::Form::rounded && V::kSums) return quantize.rounded(x);
    return quantize.template apply<kHow>(x, channel, lanes);
  }
  void operator()(size_t i, size_t channel, int lanes, typename V::I32 x) const {
    if (kAdded == Added::saturating) x = V::add_saturating(x, V::load(residual + i, lanes));
    if (kAdded == Added::fitting) x = V::add(x, V::load(residual + i, lanes));
    if (kOut) V::store(out + i, x, lanes);
    if (kCodes) V::store_codes(codes + i, quantize.template apply<kHow>(x, channel, lanes), lanes);
  }
};

// Codes that Requantize makes of the sums.
template <class V, Made kHow>
struct FinishDirect {
  static constexpr bool kFits = true, kUsualCodes = false;
  static constexpr Made kMade = kHow;
  const Direct direct;  // a copy, for the compiler to know that no code that is stored changes it
  uint8_t* codes;

  void operator()(size_t i, size_t, int lanes, typename V::I32 code) const { V::store_codes(codes + i, code, lanes); }
};

// The same by floats (see Direct), before the clip: what becomes of sums of kVectors * kLanes outputs, a vector at a time.
template <class V, int kVectors, bool kTwice>
struct FloatCodes {
  typename V::F32 scale[kVectors], bias[kVectors], code_scale[kTwice ? kVectors : 1], code_bias[kTwice ? kVectors : 1];

  FloatCodes(const Direct& direct, size_t first) {
    for (int n = 0; n < kVectors; ++n, first += V::kLanes) {
      scale[n] = V::load_floats(direct.scale + first), bias[n] = V::load_floats(direct.bias + first);
      if constexpr (kTwice) code_scale[n] = V::load_floats(direct.code_scale + first), code_bias[n] = V::load_floats(direct.code_bias + first);
    }
  }
  BITSPIKE_INLINE typename V::I32 operator()(int n, typename V::I32 sum) const {
    if constexpr (!kTwice) return V::rounded(V::multiply_add(V::floats(sum), scale[n], bias[n]));
    const typename V::F32 whole = V::multiply_add(V::floats(sum), scale[n], V::splat_float(Direct::kWhole));
    return V::rounded(V::multiply_add(V::sub(whole, bias[n]), code_scale[n], code_bias[n]));
  }
};

// Codes of potentials by floats, one line per channel.
template <class V>
struct FinishLines {
  static constexpr bool kFits = true, kUsualCodes = true;
  static constexpr Added kSum = Added::nothing;
  static constexpr bool kKept = false;
  static constexpr Made kMade = Made::potentials;
  const Direct direct;
  uint8_t* codes;

  int lo() const { return direct.lo; }
  int hi() const { return direct.hi; }
  BITSPIKE_INLINE typename V::I32 code(size_t channel, int, typename V::I32 x) const {
    return V::rounded(V::multiply_add(V::floats(x), V::load_floats(direct.code_scale + channel), V::load_floats(direct.code_bias + channel)));
  }
  void operator()(size_t i, size_t channel, int lanes, typename V::I32 x) const {
    V::store_codes(codes + i, V::clip(code(channel, lanes, x), direct.lo, direct.hi), lanes);
  }
};

// The sums themselves.
template <class V>
struct FinishSums {
  static constexpr bool kFits = true, kUsualCodes = false;
  static constexpr Made kMade = Made::sums;
  int16_t* sums;

  void operator()(size_t i, size_t, int lanes, typename V::I32 sum) const { V::store_s16(sums + i, sum, lanes); }
};

// Calls body(finish) with the most special of the above that fits. `fits`: requantizing the accumulators, bias and all,
// cannot leave 32 bits (see requant_fits).
template <class V, class Body>
void with_finish(const Epilogue& e, size_t channels, bool fits, Body body) {
  using Form = typename QuantizeVector<V>::Form;
  if constexpr (V::kSums) {
    if (e.sums) return body(FinishSums<V>{e.sums});
    if (e.direct && e.direct->scale && e.direct->code_scale) return body(FinishDirect<V, Made::twice>{*e.direct, e.codes[0]});
    if (e.direct && e.direct->scale) return body(FinishDirect<V, Made::rounded>{*e.direct, e.codes[0]});
  }
  if (e.direct && e.direct->m) return body(FinishDirect<V, Made::codes>{*e.direct, e.codes[0]});
  if constexpr (V::kSums)
    if (fits && e.direct && e.direct->code_scale) return body(FinishLines<V>{*e.direct, e.codes[0]});
  if (!fits || e.codes[1]) return body(FinishAny<V>(e, channels));
  const QuantizeVector<V> q(used_quantizer(e, 0), channels);
  using R = Added;
  constexpr int kRounded = static_cast<int>(Form::rounded), kSmall = static_cast<int>(Form::small), kSteps = static_cast<int>(Form::steps),
                kFits = static_cast<int>(Form::fits);
  const bool small = q.form == Form::small, steps = q.form == Form::steps;
  if constexpr (V::kSums) {  // where floats are
    if (e.codes[0] && q.form == Form::rounded) {
      if (e.residual && !e.out && e.fits) return body(FinishUsual<V, R::fitting, false, true, kRounded>(e, q));
      if (e.residual && !e.out) return body(FinishUsual<V, R::saturating, false, true, kRounded>(e, q));
      if (!e.out) return body(FinishUsual<V, R::nothing, false, true, kRounded>(e, q));
      if (!e.residual) return body(FinishUsual<V, R::nothing, true, true, kRounded>(e, q));
      if (e.fits) return body(FinishUsual<V, R::fitting, true, true, kRounded>(e, q));
      return body(FinishUsual<V, R::saturating, true, true, kRounded>(e, q));
    }
    if (!e.codes[0] && e.residual && e.out && e.fits) return body(FinishUsual<V, R::fitting, true, false, 0>(e, q));
  }
  if (!e.codes[0]) {
    if (!e.residual && e.out) return body(FinishUsual<V, R::nothing, true, false, 0>(e, q));
    if (e.residual && e.out) return body(FinishUsual<V, R::saturating, true, false, 0>(e, q));
  } else if (!e.residual && !e.out) {
    if (small) return body(FinishUsual<V, R::nothing, false, true, kSmall>(e, q));
    if (steps) return body(FinishUsual<V, R::nothing, false, true, kSteps>(e, q));
    if (q.form == Form::fits) return body(FinishUsual<V, R::nothing, false, true, kFits>(e, q));
  } else if (small && e.out) {
    if (e.residual) return body(FinishUsual<V, R::saturating, true, true, kSmall>(e, q));
    return body(FinishUsual<V, R::nothing, true, true, kSmall>(e, q));
  } else if (steps && e.out) {
    if (e.residual) return body(FinishUsual<V, R::saturating, true, true, kSteps>(e, q));
    return body(FinishUsual<V, R::nothing, true, true, kSteps>(e, q));
  }
  body(FinishAny<V>(e, channels));
}

// True if sat32(rshift(acc * m[o], s) + b[o]) never saturates and rshift(acc * m[o], s) stays within 32 bits, for every output.
inline bool requant_fits(const Conv& c) { return c.largest <= INT32_MAX; }

// What makes of the accumulators of kLanes outputs, the first of which is `channel`, what `Finish` takes: potentials.
template <class V, class Finish, Made kMade = by_floats(Finish::kMade) ? Made::rounded : Finish::kMade>
struct Requantize {
  typename V::Factor m, wide;
  typename V::I32 b;

  Requantize(const Finish&, size_t, const int32_t* m_at, const int32_t* b_at)
      : m(V::multiplier(m_at)), wide(b_at), b(V::load(b_at)) {}
  typename V::I32 operator()(typename V::I32 acc, const typename V::Scale& scale) const {
    return Finish::kFits ? V::add(V::requant_fits(acc, m, scale), b) : V::requant(acc, m, wide, scale);
  }
};

// Codes.
template <class V, class Finish>
struct Requantize<V, Finish, Made::codes> {
  typename V::I32 first, last, m, b;
  int shift, lo, hi;

  Requantize(const Finish& finish, size_t channel, const int32_t*, const int32_t*)
      : first(V::load(finish.direct.first + channel)), last(V::load(finish.direct.last + channel)),
        m(V::load(finish.direct.m + channel)), b(V::load(finish.direct.b + channel)), shift(finish.direct.shift),
        lo(finish.direct.lo), hi(finish.direct.hi) {}
  typename V::I32 operator()(typename V::I32 acc, const typename V::Scale&) const {
    const typename V::I32 x = V::smaller(V::larger(acc, first), last);
    return V::clip(V::shift_right(V::add(V::multiply(x, m), b), shift), lo, hi);
  }
};

template <class V, class Finish>
struct Requantize<V, Finish, Made::rounded> {
  FloatCodes<V, 1, Finish::kMade == Made::twice> codes;
  int lo, hi;

  Requantize(const Finish& finish, size_t channel, const int32_t*, const int32_t*)
      : codes(finish.direct, channel), lo(finish.direct.lo), hi(finish.direct.hi) {}
  typename V::I32 operator()(typename V::I32 acc, const typename V::Scale&) const { return V::clip(codes(0, acc), lo, hi); }
};

// Nothing.
template <class V, class Finish>
struct Requantize<V, Finish, Made::sums> {
  Requantize(const Finish&, size_t, const int32_t*, const int32_t*) {}
  typename V::I32 operator()(typename V::I32 acc, const typename V::Scale&) const { return acc; }
};

// Codes are counted where they were written: bytes are read 4 times faster than potentials are tested.
template <class V>
void count_nonzero(const Epilogue& e, size_t count) {
  for (int k = 0; k < 2; ++k)
    if (e.codes[k] && e.nonzero[k]) *e.nonzero[k] += V::count_nonzero(e.codes[k], count);
}

template <class V>
void finish(const int32_t* x, size_t rows, size_t channels, const Epilogue& e) {
  const bool one_row = (!e.codes[0] || !e.quantizer[0].per_channel) && (!e.codes[1] || !e.quantizer[1].per_channel);
  const size_t width = one_row ? rows * channels : channels;
  with_finish<V>(e, channels, true, [=](const auto& write) {
    for (size_t i = 0; i < rows * channels; i += width)
      for (size_t c = 0; c < width; c += V::kLanes) {
        const int lanes = width - c < V::kLanes ? static_cast<int>(width - c) : V::kLanes;
        write(i + c, c, lanes, V::load(x + i + c, lanes));
      }
  });
  count_nonzero<V>(e, rows * channels);
}

}  // namespace
}  // namespace bitspike
