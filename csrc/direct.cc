// How the numbers of a Direct are found, per output. With h(x) the code of the sum x, or of -x where codes fall as sums rise, h never
// falls. For every code n that h reaches beyond its lowest, let T(n) be the smallest sum with h >= n. A multiplier m > 0 and a bias b give
//
//   clip(floor((x m + b) / 2^S), lo, hi) = h(x)   for all x from T(lowest + 1) - 1 to T(highest)
//
// exactly if T(n) m + b >= n 2^S > (T(n) - 1) m + b for all n, because both sides never fall (where h leaps over codes, the n just
// before and just after). For a given m these are bounds on b; m is 2^S times the slope of h, or a neighbour of it. Sums outside
// are clipped to that range first. (x m + b) is computed modulo 2^32, which changes nothing if it stays within -2^31 .. 2^31 - 1
// at both ends of the range: two more bounds, or closer ones where the sums of a convolution end before codes reach lo or hi.
#include "direct.h"

#include <algorithm>
#include <cmath>

#include "integers.h"

namespace bitspike {
namespace {

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

}  // namespace

DirectCodes::DirectCodes(const Conv& c, const Quantizer& q) {
  const size_t taps = size_t(c.kernel_h) * c.kernel_w * c.group_channels(), padded = (size_t(c.outputs) + 127) / 64 * 64;
  double steepest = 0;  // codes per sum
  for (int o = 0; o < c.outputs; ++o)
    steepest = std::max(steepest, std::ldexp(std::abs(double(c.m[o]) * q.m[q.per_channel ? o : 0]), -c.shift - q.shift));
  int scale = 0;  // as large as leaves room for every code, and one step beyond
  while (scale < 30 && std::ldexp(std::max(q.hi + 1, -q.lo) + steepest, scale + 1) <= std::ldexp(1.0, 31)) ++scale;
  std::vector<int32_t> numbers(4 * padded);
  int32_t *first = numbers.data(), *last = first + padded, *m = last + padded, *b = m + padded;
  std::vector<Boundary> boundaries;
  for (int o = 0; o < c.outputs; ++o) {
    int64_t most = 0;
    for (const int8_t *w = c.weight + o * taps, *end = w + taps; w < end; ++w) most += *w < 0 ? -*w : *w;
    most *= std::max(c.hi, -c.lo);
    if (most >= int64_t{1} << 30) return;
    const int64_t multiplier = q.m[q.per_channel ? o : 0];
    Output f{c.m[o], c.b[o], multiplier, c.shift, q.shift, q.lo, q.hi, 1};
    if (f.code(-most) > f.code(most)) f.sign = -1;
    const int64_t lowest = f.code(-most), highest = f.code(most);
    if (lowest == highest) {
      b[o] = static_cast<int32_t>(lowest * (int64_t{1} << scale));
      continue;
    }
    if (!f.boundaries(lowest, highest, most, boundaries)) return;
    const double slope = std::ldexp(std::abs(double(f.m) * double(f.q)), scale - f.shift - f.q_shift);
    if (!(slope < double(int64_t{1} << 31))) return;
    int64_t bias = 0, times = 0;
    bool found = false;
    for (const int64_t near : {0, 1, -1, 2, -2, 3, -3}) {
      times = std::max<int64_t>(std::llround(slope) + near, 1);
      if ((found = times < int64_t{1} << 31 && fit(boundaries, q, scale, times, bias))) break;
    }
    if (!found) return;
    const int64_t from = boundaries.front().at - 1, to = boundaries.back().at;
    first[o] = static_cast<int32_t>(f.sign > 0 ? from : -to), last[o] = static_cast<int32_t>(f.sign > 0 ? to : -from);
    m[o] = static_cast<int32_t>(f.sign * times), b[o] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint64_t>(bias)));
  }
  numbers_ = std::make_shared<std::vector<int32_t>>(std::move(numbers));
  const int32_t* at = numbers_->data();
  direct_ = {scale, q.lo, q.hi, at, at + padded, at + 2 * padded, at + 3 * padded};
}

}  // namespace bitspike
