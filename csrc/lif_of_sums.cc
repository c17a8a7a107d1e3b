#include "lif_of_sums.h"

#include <algorithm>
#include <cmath>

#include "integers.h"

namespace bitspike {
namespace {

// Relative error of what takes at most eight operations on floats, each of which rounds by 2^-24, or 2^-23 if not to the nearest.
constexpr double kRounding = 1.0 / (1 << 20);
constexpr double kLargest = 1 << 30;   // potentials beyond might saturate
constexpr double kFarthest = 32;       // thresholds that a residual may be from 0
constexpr double kDoubtful = 1.0 / 24;  // share of the threshold that may be in doubt: more would be done twice too often

double power(int s) { return std::ldexp(1.0, s); }

// What is left of a stored potential at the next step, as a line in each of kPieces pieces.
struct Pieces {
  double first, last, per;
  double error = 0, slope = 0, at_zero = 0;  // largest
  float base[SumsLif::kPieces], slopes[SumsLif::kPieces];

  double farthest() const { return std::max(std::abs(first), std::abs(last)); }  // from 0
  // The integers' answer to a potential from (count == 0: anything; else table[count - 1]) on, below the next entry.
  static double left(const PackedLif& p, int count) {
    return static_cast<double>(rshift(int64_t{count - p.entries / 2} * p.lif.decay_m, p.lif.decay_s));
  }
  // A curve through the middle of every stair, which the lines follow.
  static double middle(const PackedLif& p, double v) {
    const int count = static_cast<int>(std::upper_bound(p.table, p.table + p.entries, v) - p.table);
    const auto at = [&](int k) { return (left(p, k) + left(p, k + 1)) / 2; };  // at table[k]
    if (count == 0) return left(p, 0);
    if (count == p.entries) return left(p, count);
    const double x0 = p.table[count - 1], x1 = p.table[count];
    return at(count - 1) + (at(count) - at(count - 1)) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0);
  }

  // Each line is good for what lies up to `margin` beyond its piece: where a potential is a little off, it may find itself in the next.
  Pieces(const PackedLif& p, double from, double to, double margin)
      : first(from), last(to), per((SumsLif::kPieces - 0.01) / (to - from)) {
    for (int i = 0; i < SumsLif::kPieces; ++i) {
      const double a = first + i / per, b = std::min(last, first + (i + 1) / per);
      const double steep = static_cast<float>((middle(p, b) - middle(p, a)) / (b - a));
      double least = INFINITY, most = -INFINITY;  // of what the stairs are above the line
      const auto meet = [&](double v, double stair) {
        least = std::min(least, stair - steep * v), most = std::max(most, stair - steep * v);
      };
      const double lo = a - margin, hi = b + margin;
      const int begin = static_cast<int>(std::upper_bound(p.table, p.table + p.entries, lo) - p.table);
      double at = lo;
      for (int count = begin;; ++count) {  // from stair to stair; `at`: where this one begins
        const double end = count < p.entries ? std::min<double>(p.table[count], hi) : hi;
        meet(at, left(p, count)), meet(end, left(p, count));
        if (end >= hi) break;
        at = end;
      }
      base[i] = static_cast<float>((least + most) / 2), slopes[i] = static_cast<float>(steep);
      error = std::max(error, (most - least) / 2);
      slope = std::max(slope, std::abs(steep)), at_zero = std::max<double>(at_zero, std::abs(base[i]));
    }
    error += kRounding * (at_zero + slope * farthest());
  }
};

// Three roundings of the integers (sum, residual of codes, gain), and the floats'.
double drive_error(const Lif& lif, double drive) { return lif.gain_m / power(lif.gain_s) + 0.5 + kRounding * drive; }

// How far the potentials of a neuron may be from the integers'; infinity: farther than its pieces allow, or than floats reach.
double error_of(const PackedLif& p, double drive, const Pieces* pieces, double margin) {
  const Lif& lif = p.lif;
  const double decay = lif.decay_m / power(lif.decay_s);
  const double amount = lif.reset == Lif::Reset::soft ? std::abs(double(p.amount)) : 0;
  const double rounded = drive_error(lif, drive);
  double error = rounded, largest = drive;  // at the first step
  for (int t = 1; t < lif.steps; ++t) {
    const double stored = largest + amount, off = error + kRounding * stored;
    if (pieces && off + kRounding * pieces->farthest() > margin) return INFINITY;
    const double left = pieces ? pieces->at_zero + pieces->slope * pieces->farthest() : decay * stored + 1;
    largest = left + drive;
    if (stored > kLargest || largest > kLargest) return INFINITY;
    const double kept = pieces ? pieces->error + pieces->slope * off : decay * off + 0.5;  // of what is left of the last step
    error = std::max(error, kept + rounded + kRounding * largest);
  }
  return error;
}

}  // namespace

LifOfSums::LifOfSums(const Conv& c, const PackedLif& lif, bool residual, const Scaled* codes) { prove(&c, lif, residual, codes); }

LifOfSums::LifOfSums(const PackedLif& lif) { prove(nullptr, lif, true, nullptr); }

void LifOfSums::prove(const Conv* c, const PackedLif& given, bool residual, const Scaled* codes) {
  const Lif& lif = given.lif;
  const int64_t fires = int64_t{lif.threshold} + (lif.strict ? 1 : 0);  // the least potential that does
  if (lif.steps > SumsLif::kMostSteps || fires < 1 || fires > kLargest || lif.gain_m < 1 || lif.decay_m < 0) return;
  const double gain = lif.gain_m / power(lif.gain_s), decay = lif.decay_m / power(lif.decay_s);
  double drive = 0;
  if (c) {
    const double sum = double(c->kernel_h) * c->kernel_w * c->group_channels() * c->most_weight() * c->most_code();
    if (sum > INT16_MAX) return;
    for (int o = 0; o < c->outputs; ++o)
      drive = std::max(drive, sum * std::abs(double(c->m[o])) / power(c->shift) + std::abs(double(c->b[o])) + 1);
  }
  // The residual, at most, and what one of it is worth.
  const double worth = codes ? codes->m / power(codes->shift) : 1;
  const double furthest = codes      ? std::abs(worth) * codes->hi + std::abs(double(codes->b)) + 1
                          : residual ? std::floor(kFarthest * double(fires) / gain)
                                     : 0;
  drive = gain * (drive + furthest);
  if (drive > kLargest || drive / gain > kLargest || (given.table && given.entries == 0)) return;

  double error = INFINITY;
  std::unique_ptr<Pieces> pieces;
  if (given.table) {
    // What does not fire and is kept is below the threshold, what a hard reset leaves is 0.
    const double end = given.table[given.entries - 1], last = lif.reset == Lif::Reset::hard ? std::min(end, double(fires)) : end;
    if (last <= given.table[0]) return;
    for (const double margin : {double(fires) / 256, double(fires) / 64}) {
      pieces = std::make_unique<Pieces>(given, given.table[0] - 1.0, last, margin);
      // Far from 0, floats cannot tell the pieces of a short line apart: a number of a piece must not leave 0..kPieces - 1.
      if (kRounding * pieces->farthest() * SumsLif::kPieces > 0.005 * (pieces->last - pieces->first)) return;
      error = error_of(given, drive, pieces.get(), margin);
      if (error < INFINITY) break;
    }
  } else {
    error = error_of(given, drive, nullptr, 0);
  }
  if (error > kDoubtful * double(fires) / 2) return;

  floats_ = std::make_shared<std::vector<float>>();
  const size_t outputs = c ? static_cast<size_t>(c->outputs) + 64 : 0;
  floats_->resize(2 * outputs + 2 * SumsLif::kPieces);
  float *scale = floats_->data(), *bias = scale + outputs, *line = bias + outputs;
  SumsLif& n = numbers_;
  if (c) {
    for (int o = 0; o < c->outputs; ++o) {
      scale[o] = static_cast<float>(c->m[o] / power(c->shift) * gain);
      bias[o] = static_cast<float>((c->b[o] + (codes ? codes->b : 0.0)) * gain);
    }
    n.m = c->m, n.b = c->b, n.shift = c->shift, n.scale = scale, n.bias = bias;
  }
  const auto float_below = [](double v) { return std::nextafter(static_cast<float>(v), -INFINITY); };
  const auto float_above = [](double v) { return std::nextafter(static_cast<float>(v), INFINITY); };
  n.exact = given;
  n.residual = static_cast<float>(worth * gain), n.furthest = float_below(furthest), n.decay = static_cast<float>(decay);
  if (codes) n.scaled = *codes;
  n.amount = static_cast<float>(given.amount);
  const double first = drive_error(lif, drive);
  n.below = float_below(double(fires) - error), n.above = float_above(double(fires) - 1 + error);
  n.below_first = float_below(double(fires) - first), n.above_first = float_above(double(fires) - 1 + first);
  n.pieces = line;
  if (!pieces) return;
  std::copy(pieces->base, pieces->base + SumsLif::kPieces, line);
  std::copy(pieces->slopes, pieces->slopes + SumsLif::kPieces, line + SumsLif::kPieces);
  n.first = static_cast<float>(pieces->first), n.last = static_cast<float>(pieces->last);
  n.per = static_cast<float>(pieces->per), n.offset = static_cast<float>(-pieces->first * pieces->per);
}

}  // namespace bitspike
