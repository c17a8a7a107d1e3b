// The compiled definition of correct. No cleverness here: loops in the order of the equations.
#include <string.h>

#include <initializer_list>

#include "integers.h"
#include "kernels.h"

namespace bitspike {
namespace {

int32_t value(Kind kind, const void* x, size_t i) {
  if (kind == Kind::u8) return static_cast<const uint8_t*>(x)[i];
  if (kind == Kind::s8) return static_cast<const int8_t*>(x)[i];
  return static_cast<const int32_t*>(x)[i];
}

void set_value(Kind kind, void* y, size_t i, int32_t v) {
  if (kind == Kind::u8) static_cast<uint8_t*>(y)[i] = static_cast<uint8_t>(v);
  else if (kind == Kind::s8) static_cast<int8_t*>(y)[i] = static_cast<int8_t>(v);
  else static_cast<int32_t*>(y)[i] = v;
}

// Packed, for every variant: m and b, int32 [outputs] each, then the weights as they were.
size_t conv_packed_bytes(const Conv& c) {
  return c.outputs * (2 * sizeof(int32_t) + static_cast<size_t>(c.kernel_h) * c.kernel_w * c.group_channels());
}

void conv_pack(const Conv& c, void* packed) {
  int32_t* m = static_cast<int32_t*>(packed);
  memcpy(m, c.m, c.outputs * sizeof(int32_t));
  memcpy(m + c.outputs, c.b, c.outputs * sizeof(int32_t));
  memcpy(m + 2 * c.outputs, c.weight, static_cast<size_t>(c.outputs) * c.kernel_h * c.kernel_w * c.group_channels());
}

size_t conv_scratch_bytes(const Conv&, int) { return 0; }

// Epilogue of element i, which belongs to channel c.
void finish_one(const Epilogue& e, size_t i, size_t c, int32_t x) {
  const int32_t y = e.residual ? sat32(int64_t{x} + e.residual[i]) : x;
  if (e.out) e.out[i] = y;
  for (int k = 0; k < 2; ++k) {
    if (!e.codes[k]) continue;
    const Quantizer& q = e.quantizer[k];
    const int64_t code = clip(rshift(int64_t{y} * q.m[q.per_channel ? c : 0], q.shift), q.lo, q.hi);
    e.codes[k][i] = static_cast<uint8_t>(code);
    if (e.nonzero[k]) *e.nonzero[k] += code != 0;
  }
}

void finish(const int32_t* x, size_t rows, size_t channels, const Epilogue& e) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; ++c) finish_one(e, r * channels + c, c, x[r * channels + c]);
}

// What each variant makes of one code and one weight.
int32_t multiply(int32_t x, int32_t w) { return x * w; }

int32_t add_if_event(int32_t x, int32_t w) { return x ? x * w : 0; }

// w is +1 or -1: x events, and those that meet a +1 count twice.
int32_t add_bit_if_event(int32_t x, int32_t w) { return x ? 2 * (w > 0 ? x : 0) - x : 0; }

// w is +1 or -1: every bit of x counts with its place value where w is +1; twice that, less x, is x * w.
int32_t count_bits(int32_t x, int32_t w) {
  int32_t ones = 0;
  for (int plane = 0; plane < 8; ++plane) ones += ((x >> plane) & (w > 0)) << plane;
  return 2 * ones - x;
}

int32_t shift_by_exponent(int32_t x, int32_t w) {
  if (w == 0) return 0;
  int exponent = 0;
  while ((1 << exponent) < (w < 0 ? -w : w)) ++exponent;
  const int32_t shifted = static_cast<int32_t>(static_cast<uint32_t>(x) << exponent);
  return w < 0 ? -shifted : shifted;
}

template <int32_t (*term)(int32_t, int32_t)>
void conv(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void*) {
  const int in = c.group_channels();
  const int32_t *m = static_cast<const int32_t*>(packed), *b = m + c.outputs;
  size_t at = 0;
  for (int oy = row0; oy < row1; ++oy)
    for (int ox = 0; ox < c.out_width; ++ox)
      for (int o = 0; o < c.outputs; ++o) {
        const int first = o / c.group_outputs() * in;
        const int8_t* w = reinterpret_cast<const int8_t*>(b + c.outputs) + static_cast<size_t>(o) * c.kernel_h * c.kernel_w * in;
        int32_t acc = 0;
        for (int ky = 0; ky < c.kernel_h; ++ky)
          for (int kx = 0; kx < c.kernel_w; ++kx) {
            const int y = oy * c.stride_h - c.pad_h + ky, x = ox * c.stride_w - c.pad_w + kx;
            const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
            const size_t pixel = inside ? (static_cast<size_t>(y) * c.width + x) * c.channels : 0;
            for (int i = 0; i < in; ++i)
              acc += term(inside ? value(c.kind, image, pixel + first + i) : c.pad_value[first + i], *w++);
          }
        finish_one(e, at++, o, sat32(rshift(int64_t{acc} * m[o], c.shift) + b[o]));
      }
}

template <Variant variant, int32_t (*term)(int32_t, int32_t)>
constexpr ConvKernel conv_kernel() {
  return {[](const Conv& c) { return may_support(variant, c); }, conv_packed_bytes, conv_pack, conv_scratch_bytes,
          conv<term>};
}

void quantize(const int32_t* x, size_t rows, size_t channels, const int32_t* m, bool per_channel, int shift, int32_t lo,
              int32_t hi, bool is_signed, void* y) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = r * channels + c;
      const int64_t code = clip(rshift(int64_t{x[i]} * m[per_channel ? c : 0], shift), lo, hi);
      set_value(is_signed ? Kind::s8 : Kind::u8, y, i, static_cast<int32_t>(code));
    }
}

void affine(Kind kind, const void* x, size_t rows, size_t channels, const int32_t* m, const int32_t* b,
            bool per_channel, int shift, int32_t* y) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = r * channels + c, p = per_channel ? c : 0;
      y[i] = sat32(rshift(int64_t{value(kind, x, i)} * m[p], shift) + b[p]);
    }
}

void add(const int32_t* a, const int32_t* b, size_t count, int32_t* y) {
  for (size_t i = 0; i < count; ++i) y[i] = sat32(int64_t{a[i]} + b[i]);
}

void maxpool(const Pool& p, const void* image, int row0, int row1, void* out) {
  size_t i = 0;
  for (int oy = row0; oy < row1; ++oy)
    for (int ox = 0; ox < p.out_width; ++ox)
      for (int c = 0; c < p.channels; ++c, ++i) {
        int32_t best = INT32_MIN;
        for (int ky = 0; ky < p.kernel_h; ++ky)
          for (int kx = 0; kx < p.kernel_w; ++kx) {
            const int y = oy * p.stride_h - p.pad_h + ky, x = ox * p.stride_w - p.pad_w + kx;
            if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
            const int32_t v = value(p.kind, image, (static_cast<size_t>(y) * p.width + x) * p.channels + c);
            if (v > best) best = v;
          }
        set_value(p.kind, out, i, best);
      }
}

size_t attention_scratch_bytes(const Attention& a) { return sizeof(int32_t) * a.head_channels * a.head_channels; }

void attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch) {
  const size_t d = a.head_channels, step = a.channels, tokens = a.tokens;
  int32_t* kv = static_cast<int32_t*>(scratch);  // [d, d]
  for (size_t i = 0; i < d; ++i)
    for (size_t j = 0; j < d; ++j) {
      int32_t sum = 0;
      for (size_t n = 0; n < tokens; ++n) sum += k[n * step + i] * v[n * step + j];
      kv[i * d + j] = sum;
    }
  for (size_t n = 0; n < tokens; ++n)
    for (size_t j = 0; j < d; ++j) {
      int32_t acc = 0;
      for (size_t i = 0; i < d; ++i) acc += q[n * step + i] * kv[i * d + j];
      y[n * step + j] = sat32(rshift(int64_t{acc} * a.m, a.shift));
    }
}

size_t map_scratch_bytes(const Heads&, bool, size_t) { return 0; }

void attention_map(const Heads& s, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1,
                   int32_t m, int shift, int32_t* y, void*) {
  const size_t step = s.heads * s.width, side = over_channels ? s.tokens : s.width, terms = over_channels ? s.width : s.tokens;
  for (size_t row = row0; row < row1; ++row)
    for (size_t h = 0; h < s.heads; ++h)
      for (size_t i = 0; i < side; ++i) {
        int32_t acc = 0;
        for (size_t k = 0; k < terms; ++k)
          acc += over_channels ? a[row * step + h * s.width + k] * b[i * step + h * s.width + k]
                               : a[k * step + h * s.width + row] * b[k * step + h * s.width + i];
        *y++ = sat32(rshift(int64_t{acc} * m, shift));
      }
}

void attention_read(const Heads& s, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first, size_t count,
                    const int32_t* m, int shift, int32_t* y, void*) {
  const size_t step = s.heads * s.width, side = over_tokens ? s.tokens : s.width;
  for (size_t n = first; n < first + count; ++n)
    for (size_t h = 0; h < s.heads; ++h)
      for (size_t j = 0; j < s.width; ++j) {
        int32_t acc = 0;
        for (size_t k = 0; k < side; ++k)
          acc += over_tokens ? chosen[(n * s.heads + h) * side + k] * x[k * step + h * s.width + j]
                             : chosen[(j * s.heads + h) * side + k] * x[n * step + h * s.width + k];
        *y++ = sat32(rshift(int64_t{acc} * m[h], shift));
      }
}

void lif(const Lif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  scalar_lif_packed({p, p.threshold, nullptr, 0, nullptr}, x, count, x_stride, y, y_stride);
}

void ielif(const IeLif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  for (size_t i = 0; i < count; ++i) {
    int32_t v = 0;
    for (int t = 0; t < p.steps; ++t) {
      const int32_t u = sat32(int64_t{v} + x[t * x_stride + i]);
      const int64_t n = clip(rshift(u, p.fraction_bits), 0, p.levels);
      v = sat32(rshift((u - n * (int64_t{1} << p.fraction_bits)) * p.decay_m, p.decay_s));
      y[t * y_stride + i] = static_cast<uint8_t>(n);
    }
  }
}

}  // namespace

void scalar_lif_packed(const PackedLif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  const Lif& lif = p.lif;
  for (size_t i = 0; i < count; ++i) {
    int32_t v = 0;
    for (int t = 0; t < lif.steps; ++t) {
      const int32_t h = sat32(rshift(int64_t{v} * lif.decay_m, lif.decay_s) +
                              rshift(int64_t{x[t * x_stride + i]} * lif.gain_m, lif.gain_s));
      const bool spike = lif.strict ? h > lif.threshold : h >= lif.threshold;
      y[t * y_stride + i] = spike;
      v = h;
      if (spike && lif.reset == Lif::Reset::hard) v = 0;
      if (spike && lif.reset == Lif::Reset::soft) v = sat32(int64_t{h} - p.amount);
      if (!p.table) continue;
      const int32_t* from = p.table;  // the first entry above v, by halving
      for (int left = p.entries; left > 0;) {
        const int half = left / 2;
        if (from[half] <= v) from += half + 1, left -= half + 1;
        else left = half;
      }
      v = static_cast<int32_t>(from - p.table) - p.entries / 2;
    }
  }
}

size_t make_buckets(const int32_t* table, int entries, uint32_t* words, Buckets* buckets) {
  if (entries < 1 || entries > 254 || table[0] == INT32_MIN) return 0;
  uint32_t gap = UINT32_MAX;
  for (int e = 1; e < entries; ++e) {
    const uint32_t between = static_cast<uint32_t>(table[e]) - static_cast<uint32_t>(table[e - 1]);
    if (between < gap) gap = between;
  }
  if (gap == 0) return 0;  // two at one potential
  int shift = 0;
  while (shift < Buckets::kOffsetBits - 1 && gap >> (shift + 1)) ++shift;
  const int32_t first = table[0] - 1;  // where no entry counts yet
  const size_t count = ((static_cast<uint32_t>(table[entries - 1]) - static_cast<uint32_t>(first)) >> shift) + 1;
  if (count > Buckets::kMost) return 0;
  if (!words) return count;
  int e = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t before = static_cast<uint32_t>(e) << Buckets::kOffsetBits;
    const uint32_t place = e < entries ? static_cast<uint32_t>(table[e]) - static_cast<uint32_t>(first) : 0;
    const bool here = e < entries && place >> shift == i;
    words[i] = before | (here ? place & ((1u << shift) - 1) : Buckets::kNone);
    e += here;
  }
  *buckets = {words, first, table[entries - 1], shift};
  return count;
}

void scalar_mean(Kind kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y) {
  const int64_t n = static_cast<int64_t>(rows);
  for (size_t c = 0; c < columns; ++c) {
    int64_t sum = 0;
    for (size_t r = 0; r < rows; ++r) sum += value(kind, x, r * row_stride + c);
    const int64_t top = int64_t{2} * m * sum + n, bottom = 2 * n;
    const int64_t towards_zero = top / bottom;
    y[c] = sat32(towards_zero - (top % bottom < 0));
  }
}

void scalar_lookup(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; ++c) y[r * channels + c] = table[c * 256 + x[r * channels + c]];
}

// The largest weight of a wide tile of winograd, 3x3 weights.
static int largest_wide(const Conv& c) {
  if (21 * c.most_weight() <= 127) return 127;
  int largest = 0;
  for (int o = 0; o < c.outputs; ++o)
    for (int i = 0; i < c.channels; ++i) {
      const int8_t* g = c.weight + static_cast<size_t>(o) * 9 * c.channels + i;
      for (const int sign : {1, -1}) {  // 1, +-1, 1 along columns (2 0 0 is less), and 1, +-2, 4 along rows
        int k[3];
        for (int x = 0; x < 3; ++x) k[x] = g[x * c.channels] + sign * g[(3 + x) * c.channels] + g[(6 + x) * c.channels];
        for (const int u : {k[0] + 2 * k[1] + 4 * k[2], k[0] - 2 * k[1] + 4 * k[2]}) largest = u > largest ? u : -u > largest ? -u : largest;
      }
      for (const int row : {0, 6})
        for (const int s : {2, -2}) {
          const int u = 2 * (g[row * c.channels] + s * g[(row + 1) * c.channels] + 4 * g[(row + 2) * c.channels]);
          largest = u > largest ? u : -u > largest ? -u : largest;
        }
    }
  return largest;
}

static int64_t largest_potential(const Conv& c) {
  const size_t taps = static_cast<size_t>(c.kernel_h) * c.kernel_w * c.group_channels();
  const auto size = [](int64_t v) { return v < 0 ? -v : v; };
  int64_t largest = 0;
  for (int o = 0; o < c.outputs; ++o) {
    const int8_t* w = c.weight + o * taps;
    int64_t sum = 0;
    for (size_t k = 0; k < taps;) {
      int32_t part = 0;  // of at most 2^16 weights, so that it stays narrow enough for the vectorizer
      for (const size_t end = taps - k < 65536 ? taps : k + 65536; k < end; ++k) part += w[k] < 0 ? -w[k] : w[k];
      sum += part;
    }
    sum *= c.most_code();
    const int64_t m = size(c.m[o]), all = sum > INT32_MAX ? int64_t{1} << 62 : (sum * m >> c.shift) + 1 + size(c.b[o]);
    largest = all > largest ? all : largest;
  }
  return largest;
}

void describe_weights(Conv& c) {
  const size_t count = static_cast<size_t>(c.outputs) * c.kernel_h * c.kernel_w * c.group_channels();
  bool seen[256] = {};
  for (size_t i = 0; i < count; ++i) seen[c.weight[i] + 128] = true;
  c.weight_lo = 127, c.weight_hi = -128;
  c.weight_pow2 = c.weight_bipolar = true;
  for (int w = -128; w < 128; ++w) {
    if (!seen[w + 128]) continue;
    if (w < c.weight_lo) c.weight_lo = w;
    if (w > c.weight_hi) c.weight_hi = w;
    const int size = w < 0 ? -w : w;
    if (size & (size - 1)) c.weight_pow2 = false;
    if (size != 1) c.weight_bipolar = false;
  }
  c.largest = largest_potential(c);
  const int64_t weight = c.most_weight();
  // Sums are 48 times as large before the last shift.
  const bool small = c.hi <= 7 && 9 * weight * c.hi * c.channels < int64_t{1} << 25;
  c.wide_tiles = may_support(Variant::winograd, c) && small && largest_wide(c) <= 127;
}

const char* variant_name(Variant v) {
  switch (v) {
    case Variant::dense: return "dense";
    case Variant::narrow: return "narrow";
    case Variant::events: return "events";
    case Variant::sliced: return "sliced";
    case Variant::popcount: return "popcount";
    case Variant::shift: return "shift";
    case Variant::winograd: return "winograd";
    case Variant::matrix: return "matrix";
  }
  return "";
}

bool may_support(Variant v, const Conv& c) {
  if (v == Variant::dense) return true;
  if (c.depthwise()) return false;  // one channel per output leaves nothing to pack, skip or count
  const bool counts = c.kind == Kind::u8 && c.lo >= 0;
  switch (v) {
    case Variant::dense: return true;
    case Variant::narrow: return c.weight_lo >= -8 && c.weight_hi <= 7;
    case Variant::events: return counts;
    case Variant::sliced:
    case Variant::popcount: return counts && c.weight_bipolar && c.hi <= 15;
    case Variant::shift: return c.weight_pow2;
    case Variant::matrix: return c.groups == 1 && c.kernel_w <= 16 && c.kernel_w * c.channels >= 8;  // else mostly padding in memory
    case Variant::winograd: {
      const bool shape = c.groups == 1 && c.kernel_h == 3 && c.kernel_w == 3 && c.stride_h == 1 && c.stride_w == 1;
      const int64_t weight = c.most_weight();
      // Sums are four times as large before the last shift.
      return shape && counts && c.hi <= 63 && 9 * weight <= 127 && 9 * weight * c.hi * c.channels < int64_t{1} << 29;
    }
  }
  return false;
}

constexpr Kernels kernels_scalar = {"scalar",
                                    {conv_kernel<Variant::dense, multiply>(), conv_kernel<Variant::narrow, multiply>(),
                                     conv_kernel<Variant::events, add_if_event>(),
                                     conv_kernel<Variant::sliced, add_bit_if_event>(),
                                     conv_kernel<Variant::popcount, count_bits>(),
                                     conv_kernel<Variant::shift, shift_by_exponent>(),
                                     conv_kernel<Variant::winograd, multiply>(), conv_kernel<Variant::matrix, multiply>()},
                                    finish,
                                    quantize,
                                    affine,
                                    add,
                                    maxpool,
                                    attention_scratch_bytes,
                                    attention,
                                    {map_scratch_bytes, attention_map, map_scratch_bytes, attention_read},
                                    scalar_mean,
                                    lif,
                                    scalar_lif_packed,
                                    nullptr,
                                    ielif,
                                    scalar_lookup,
                                    false,
                                    0,
                                    false,
                                    nullptr};

}  // namespace bitspike
