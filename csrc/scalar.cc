// The compiled definition of correct. No cleverness here: loops in the order of the equations.
#include "kernels.h"

namespace bitspike {
namespace {

int64_t rshift(int64_t x, int s) { return s > 0 ? (x + (int64_t{1} << (s - 1))) >> s : x; }

int64_t clip(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

int32_t sat32(int64_t x) { return static_cast<int32_t>(clip(x, INT32_MIN, INT32_MAX)); }

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

size_t conv_packed_bytes(const Conv&) { return 0; }
void conv_pack(const Conv&, void*) {}
size_t conv_scratch_bytes(const Conv&, int) { return 0; }

void conv(const Conv& c, const void* image, int row0, int row1, int32_t* out, void*) {
  const int in = c.group_channels();
  for (int oy = row0; oy < row1; ++oy)
    for (int ox = 0; ox < c.out_width; ++ox)
      for (int o = 0; o < c.outputs; ++o) {
        const int first = o / c.group_outputs() * in;
        const int8_t* w = c.weight + static_cast<size_t>(o) * c.kernel_h * c.kernel_w * in;
        int32_t acc = 0;
        for (int ky = 0; ky < c.kernel_h; ++ky)
          for (int kx = 0; kx < c.kernel_w; ++kx) {
            const int y = oy * c.stride_h - c.pad_h + ky, x = ox * c.stride_w - c.pad_w + kx;
            const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
            const size_t pixel = inside ? (static_cast<size_t>(y) * c.width + x) * c.channels : 0;
            for (int i = 0; i < in; ++i)
              acc += *w++ * (inside ? value(c.kind, image, pixel + first + i) : c.pad_value[first + i]);
          }
        *out++ = sat32(rshift(int64_t{acc} * c.m[o], c.shift) + c.b[o]);
      }
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

void lif(const Lif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  for (size_t i = 0; i < count; ++i) {
    int32_t v = 0;
    for (int t = 0; t < p.steps; ++t) {
      const int32_t h = sat32(rshift(int64_t{v} * p.decay_m, p.decay_s) +
                              rshift(int64_t{x[t * x_stride + i]} * p.gain_m, p.gain_s));
      const bool spike = p.strict ? h > p.threshold : h >= p.threshold;
      y[t * y_stride + i] = spike;
      v = h;
      if (spike && p.reset == Lif::Reset::hard) v = 0;
      if (spike && p.reset == Lif::Reset::soft) v = sat32(int64_t{h} - p.threshold);
    }
  }
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

void scalar_mean(Kind kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y) {
  const int64_t n = static_cast<int64_t>(rows);
  for (size_t c = 0; c < columns; ++c) {
    int64_t sum = 0;
    for (size_t r = 0; r < rows; ++r) sum += value(kind, x, r * row_stride + c);
    const int64_t top = 2 * m * sum + n, bottom = 2 * n;
    const int64_t towards_zero = top / bottom;
    y[c] = sat32(towards_zero - (top % bottom < 0));
  }
}

void scalar_lookup(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; ++c) y[r * channels + c] = table[c * 256 + x[r * channels + c]];
}

constexpr Kernels kernels_scalar = {"scalar",    conv_packed_bytes, conv_pack,   conv_scratch_bytes,
                                    conv,        quantize,          affine,      add,
                                    maxpool,     attention_scratch_bytes, attention, scalar_mean,
                                    lif,         ielif,             scalar_lookup};

}  // namespace bitspike
