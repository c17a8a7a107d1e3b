// How the numbers of a Direct are found, per output. With h(x) the code of the sum x, or of -x where codes fall as sums rise, h never
// falls. For every code n that h reaches beyond its lowest, let T(n) be the smallest sum with h >= n. A multiplier m > 0 and a bias b give
//
//   clip(floor((x m + b) / 2^S), lo, hi) = h(x)   for all x from T(lowest + 1) - 1 to T(highest)
//
// exactly if T(n) m + b >= n 2^S > (T(n) - 1) m + b for all n, because both sides never fall (where h leaps over codes, the n just
// before and just after). For a given m these are bounds on b; m is 2^S times the slope of h, or a neighbour of it. Sums outside
// are clipped to that range first. (x m + b) is computed modulo 2^32, which changes nothing if it stays within -2^31 .. 2^31 - 1
// at both ends of the range: two more bounds, or closer ones where the sums of a convolution end before codes reach lo or hi.
//
// In floats the same line is x m / 2^S + (b + 1/2) / 2^S - 1/2, rounded to the nearest number: conversion, fused product and rounding
// never fall either, so they make h of all sums if they do so of the outermost ones and on both sides of every boundary, which is computed.
// Where the two roundings of h have moved a boundary across a sum, another line may pass by all of them (`roomiest`), and if there is none for
// some output, potentials are made as defined, and a line makes codes of them. Potentials may be made by floats then, too, if what two lines make,
// each rounded, is h at the outermost sums and on both sides of every boundary: at other sums the potential may well be another one.
#include "direct.h"

#include <algorithm>
#include <cmath>

#include "integers.h"

namespace bitspike {
namespace {

constexpr float kMostCode = 1e9f;  // before the clip: fits into an integer
constexpr int kMostSteps = 16;  // away from where a linear h would have its next boundary

struct Boundary {  // h goes from `before` to `after` between `at` - 1 and `at`
  int64_t at, before, after;
};

struct Output {  // one of a convolution's
  int64_t m, b, q;
  int shift, q_shift, lo, hi, sign;

  int64_t code(int64_t x) const {  // h
    return clip(rshift(int64_t{sat32(rshift(sign * x * m, shift) + b)} * q, q_shift), lo, hi);
  }
  // The smallest sum in (below, above] whose code is n or more; that of `below` is less, that of `above` is not.
  int64_t search(int64_t n, int64_t below, int64_t above) const {
    while (above - below > 1) {
      const int64_t middle = below + (above - below) / 2;
      (code(middle) >= n ? above : below) = middle;
    }
    return above;
  }
  // All boundaries, the codes of sums up to `most` going from `lowest` to `highest`; false if h is not the straight line it should be.
  bool boundaries(int64_t lowest, int64_t highest, int64_t most, std::vector<Boundary>& found) const {
    found.clear();
    const int64_t first = search(lowest + 1, -most, most), last = search(highest, first - 1, most);
    if (last - first < highest - lowest) {  // fewer sums than codes
      int64_t before = lowest;
      for (int64_t x = first; x <= last; ++x) {
        const int64_t after = code(x);
        if (after > before) found.push_back({x, before, after});
        before = after;
      }
      return true;
    }
    const double step = highest > lowest + 1 ? double(last - first) / double(highest - lowest - 1) : 0;
    for (int64_t n = lowest + 1; n <= highest; ++n) {
      int64_t at = std::clamp<int64_t>(first + std::llround(step * double(n - lowest - 1)), first, last);
      int steps = 0;
      while (at > first && code(at - 1) >= n && steps < kMostSteps) --at, ++steps;
      while (code(at) < n && steps < kMostSteps) ++at, ++steps;
      if (steps == kMostSteps) return false;
      found.push_back({at, n - 1, n});
    }
    return true;
  }
};

// b for the given m, and whether there is one. The ends of the range must have their own codes, unless they are clipped to them.
bool fit(const std::vector<Boundary>& boundaries, const Quantizer& q, int scale, int64_t m, int64_t& b) {
  const int64_t one = int64_t{1} << scale, lowest = boundaries.front().before, highest = boundaries.back().after;
  int64_t least = (lowest > q.lo ? lowest * one : INT32_MIN) - (boundaries.front().at - 1) * m;
  int64_t most = (highest < q.hi ? (highest + 1) * one - 1 : INT32_MAX) - boundaries.back().at * m;
  for (const Boundary& n : boundaries) {
    least = std::max(least, n.after * one - n.at * m);
    most = std::min(most, (n.before + 1) * one - 1 - (n.at - 1) * m);
  }
  b = least + (most - least) / 2;
  return least <= most;
}

// A line in floats.
struct Line {
  float scale, bias;

  // Whether it makes the codes of the outermost sums and those at both sides of every boundary.
  bool fits(const std::vector<Boundary>& boundaries, const Quantizer& q, int64_t most) const {
    const auto code = [&](int64_t x) {
      return clip(static_cast<int64_t>(std::nearbyint(std::fma(static_cast<float>(x), scale, bias))), q.lo, q.hi);
    };
    for (const Boundary& n : boundaries)
      if (code(n.at - 1) != n.before || code(n.at) != n.after) return false;
    // A code fits into an integer, whatever the sum.
    return code(-most) == boundaries.front().before && code(most) == boundaries.back().after &&
           std::abs(scale * float(most)) + std::abs(bias) < kMostCode;
  }
};

// The line with the most room on both sides: at every boundary it must pass below the half before its higher code one sum earlier, and above the
// half at the boundary. For a slope these are bounds on the bias; their distance is a concave function of the slope, made of straight
// pieces, so that the sign of its slope tells where to go on.
Line roomiest(const std::vector<Boundary>& boundaries, double slope) {
  double low = slope * (1 - 1e-3), high = slope * (1 + 1e-3), bias = 0;
  for (int i = 0; i < 40; ++i) {
    slope = (low + high) / 2;
    double most = HUGE_VAL, least = -HUGE_VAL, most_at = 0, least_at = 0;
    for (const Boundary& n : boundaries) {
      const double above = n.before + 0.5 - slope * static_cast<double>(n.at - 1), below = n.after - 0.5 - slope * static_cast<double>(n.at);
      if (above < most) most = above, most_at = static_cast<double>(n.at - 1);
      if (below > least) least = below, least_at = static_cast<double>(n.at);
    }
    bias = (most + least) / 2;
    (least_at > most_at ? low : high) = slope;
  }
  return {static_cast<float>(slope), static_cast<float>(bias)};
}

// The line for codes of potentials not further from 0 than `most`, h being one multiplication; false if it does not make all of them.
bool line_of_codes(int64_t m, const Quantizer& q, int64_t most, Line& line) {
  line = {0, 0};
  if (m <= 0 || most > int64_t{1} << 30) return false;
  const Output f{1, 0, m, 0, q.shift, q.lo, q.hi, 1};
  const int64_t lowest = f.code(-most), highest = f.code(most);
  line = {0, static_cast<float>(lowest)};
  std::vector<Boundary> boundaries;
  if (lowest == highest) return true;
  if (!f.boundaries(lowest, highest, most, boundaries)) return false;
  line = roomiest(boundaries, std::ldexp(static_cast<double>(m), -q.shift));
  return line.fits(boundaries, q, most);
}

// The line that makes potentials of sums, themselves rounded, for `code` to make h of: again three functions that never fall. Its bias is what is
// to be taken from floats as large as kWhole. Its slope is that of the definition, or of floats near it; and `code` may be moved by parts of a
// potential, for it need only be right at the potentials that there are.
bool line_of_potentials(const Output& f, Line& code, const Quantizer& q, const std::vector<Boundary>& boundaries, int64_t most, Line& line) {
  const double slope = std::ldexp(static_cast<double>(f.m), -f.shift), product = std::abs(slope) * static_cast<double>(most) + 3;
  const double b = std::abs(static_cast<double>(f.b)), largest = 1 << 22;  // of whole numbers as kWhole makes them
  if (!(code.scale > 0) || most >= int64_t{1} << 30 || product >= largest || b >= largest) return false;
  if ((product + b) * code.scale + std::abs(code.bias) + code.scale >= kMostCode) return false;
  line.bias = Direct::kWhole - static_cast<float>(f.b);
  const auto made = [&](int64_t x) {
    const float whole = std::fma(static_cast<float>(f.sign * x), line.scale, Direct::kWhole);
    return clip(static_cast<int64_t>(std::nearbyint(std::fma(whole - line.bias, code.scale, code.bias))), q.lo, q.hi);
  };
  const auto fits = [&] {
    for (const Boundary& n : boundaries)
      if (made(n.at - 1) != n.before || made(n.at) != n.after) return false;
    return made(-most) == f.code(-most) && made(most) == f.code(most);
  };
  const float bias = code.bias;
  for (const int part : {0, 1, -1, 2, -2, 3, -3}) {
    code.bias = bias + static_cast<float>(part) * code.scale / 8;
    line.scale = static_cast<float>(slope);
    if (fits()) return true;
    for (const float towards : {HUGE_VALF, -HUGE_VALF}) {
      line.scale = static_cast<float>(slope);
      for (int away = 0; away < 3; ++away) {
        line.scale = std::nextafter(line.scale, towards);
        if (fits()) return true;
      }
    }
  }
  return false;
}

}  // namespace

DirectCodes::DirectCodes(const Conv& c, const Quantizer& q) {
  const size_t taps = size_t(c.kernel_h) * c.kernel_w * c.group_channels(), padded = (size_t(c.outputs) + 127) / 64 * 64;
  const auto furthest = [&](int o) {  // from 0 that a sum may be
    int64_t most = 0;
    for (const int8_t *w = c.weight + o * taps, *end = w + taps; w < end; ++w) most += *w < 0 ? -*w : *w;
    return most * std::max(c.hi, -c.lo);
  };
  const auto output = [&](int o, int64_t most) {
    Output f{c.m[o], c.b[o], q.m[q.per_channel ? o : 0], c.shift, q.shift, q.lo, q.hi, 1};
    if (f.code(-most) > f.code(most)) f.sign = -1;
    return f;
  };
  double steepest = 0;  // codes per sum
  for (int o = 0; o < c.outputs; ++o)
    steepest = std::max(steepest, std::ldexp(std::abs(double(c.m[o]) * q.m[q.per_channel ? o : 0]), -c.shift - q.shift));
  int scale = 0;  // as large as leaves room for every code, and one step beyond
  while (scale < 30 && std::ldexp(std::max(q.hi + 1, -q.lo) + steepest, scale + 1) <= std::ldexp(1.0, 31)) ++scale;
  std::vector<int32_t> numbers(4 * padded);
  std::vector<float> floats(4 * padded);
  int32_t *first = numbers.data(), *last = first + padded, *m = last + padded, *b = m + padded;
  bool whole = true, rounded = q.lo >= -128 && q.hi <= 255;  // whether there are numbers for all outputs
  std::vector<Boundary> boundaries;
  for (int o = 0; o < c.outputs; ++o) {
    const int64_t most = furthest(o);
    if (most >= int64_t{1} << 30) return;
    const Output f = output(o, most);
    const int64_t lowest = f.code(-most), highest = f.code(most);
    if (lowest == highest) {
      b[o] = static_cast<int32_t>(lowest * (int64_t{1} << scale));
      floats[padded + o] = static_cast<float>(lowest);
      continue;
    }
    if (!f.boundaries(lowest, highest, most, boundaries)) return;
    const double codes = std::ldexp(std::abs(double(f.m) * double(f.q)), -f.shift - f.q_shift), slope = std::ldexp(codes, scale);
    int64_t bias = 0, times = 0;
    bool found = false;
    for (const int64_t near : {0, 1, -1, 2, -2, 3, -3}) {
      if (!whole || !(slope < double(int64_t{1} << 31))) break;
      times = std::max<int64_t>(std::llround(slope) + near, 1);
      if ((found = times < int64_t{1} << 31 && fit(boundaries, q, scale, times, bias))) break;
    }
    whole = whole && found;
    Line line{static_cast<float>(std::ldexp(double(times), -scale)), static_cast<float>(std::ldexp(double(bias) + 0.5, -scale) - 0.5)};
    if (rounded && !(found && line.fits(boundaries, q, most))) {
      line = roomiest(boundaries, codes);
      rounded = line.fits(boundaries, q, most);
    }
    if (!whole && !rounded) break;
    floats[o] = f.sign > 0 ? line.scale : -line.scale, floats[padded + o] = line.bias;
    const int64_t from = boundaries.front().at - 1, to = boundaries.back().at;
    first[o] = static_cast<int32_t>(f.sign > 0 ? from : -to), last[o] = static_cast<int32_t>(f.sign > 0 ? to : -from);
    m[o] = static_cast<int32_t>(f.sign * times), b[o] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint64_t>(bias)));
  }
  const bool others = !whole && !rounded && q.lo >= -128 && q.hi <= 255;
  bool lines = others, twice = others;  // codes of potentials by floats; those, and potentials
  std::vector<Line> codes(others ? c.outputs : 0), potentials(codes.size());
  for (size_t o = 0; o < codes.size(); ++o) {
    if (o == 0 || q.per_channel) lines = line_of_codes(q.m[o], q, c.largest, codes[o]) && lines;
    else codes[o] = codes[0];
  }
  const std::vector<Line> exact = codes;
  for (int o = 0; o < c.outputs && twice; ++o) {
    const int64_t most = furthest(o);
    const Output f = output(o, most);
    boundaries.clear();
    const int64_t lowest = f.code(-most), highest = f.code(most);
    twice = (lowest == highest || f.boundaries(lowest, highest, most, boundaries)) &&
            line_of_potentials(f, codes[o], q, boundaries, most, potentials[o]);
  }
  for (size_t o = 0; o < codes.size(); ++o) {
    const Line& code = twice ? codes[o] : exact[o];
    floats[o] = potentials[o].scale, floats[padded + o] = potentials[o].bias;
    floats[2 * padded + o] = code.scale, floats[3 * padded + o] = code.bias;
  }
  if (!whole && !rounded && !lines && !twice) return;
  numbers_ = std::make_shared<Numbers>(Numbers{std::move(numbers), std::move(floats)});
  direct_ = {scale, q.lo, q.hi, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int32_t* at = numbers_->whole.data();
  if (whole) direct_.first = at, direct_.last = at + padded, direct_.m = at + 2 * padded, direct_.b = at + 3 * padded;
  const float* rates = numbers_->floats.data();
  if (rounded || twice) direct_.scale = rates, direct_.bias = rates + padded;
  if (lines || twice) direct_.code_scale = rates + 2 * padded, direct_.code_bias = rates + 3 * padded;
}

}  // namespace bitspike
