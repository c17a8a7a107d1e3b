// The other vector kernels over the primitives of tiles.h. Plain loops here are left to the compiler's vectorizer,
// which has this file's instruction set too; where it would lose (int64 products, saturation) primitives are used.
#pragma once
#include "tiles.h"

namespace bitspike {
namespace {

template <class V>
void quantize(const int32_t* x, size_t rows, size_t channels, const int32_t* m, bool per_channel, int shift, int32_t lo,
              int32_t hi, bool, void* y) {
  // u8 and s8 differ in lo and hi only: the low byte of the clipped code is the code in both.
  uint8_t* to = static_cast<uint8_t*>(y);
  const typename V::Scale scale(shift);
  const typename V::Factor zero(0), one_m(m[0]);
  for (size_t r = 0; r < rows; ++r, x += channels, to += channels)
    for (size_t c = 0; c < channels; c += V::kLanes) {
      const int lanes = channels - c < V::kLanes ? static_cast<int>(channels - c) : V::kLanes;
      const typename V::Factor factor = per_channel ? V::factor(m + c, lanes) : one_m;
      V::store_codes(to + c, V::clip(V::requant(V::load(x + c, lanes), factor, zero, scale), lo, hi), lanes);
    }
}

template <class V, class Load>
void affine_rows(size_t rows, size_t channels, const int32_t* m, const int32_t* b, bool per_channel, int shift,
                 int32_t* y, Load load) {
  const typename V::Scale scale(shift);
  const typename V::Factor one_m(m[0]), one_b(b[0]);
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < channels; c += V::kLanes) {
      const int lanes = channels - c < V::kLanes ? static_cast<int>(channels - c) : V::kLanes;
      const typename V::Factor fm = per_channel ? V::factor(m + c, lanes) : one_m;
      const typename V::Factor fb = per_channel ? V::factor(b + c, lanes) : one_b;
      const size_t i = r * channels + c;
      V::store(y + i, V::requant(load(i, lanes), fm, fb, scale), lanes);
    }
}

template <class V>
void affine(Kind kind, const void* x, size_t rows, size_t channels, const int32_t* m, const int32_t* b,
            bool per_channel, int shift, int32_t* y) {
  const uint8_t* codes = static_cast<const uint8_t*>(x);
  if (kind == Kind::i32) {
    affine_rows<V>(rows, channels, m, b, per_channel, shift, y,
                   [=](size_t i, int lanes) { return V::load(static_cast<const int32_t*>(x) + i, lanes); });
  } else if (kind == Kind::u8) {
    affine_rows<V>(rows, channels, m, b, per_channel, shift, y,
                   [=](size_t i, int lanes) { return V::widen_u8(codes + i, lanes); });
  } else {
    affine_rows<V>(rows, channels, m, b, per_channel, shift, y,
                   [=](size_t i, int lanes) { return V::widen_s8(codes + i, lanes); });
  }
}

template <class V>
void add(const int32_t* a, const int32_t* b, size_t count, int32_t* y) {
  for (size_t i = 0; i < count; i += V::kLanes) {
    const int lanes = count - i < V::kLanes ? static_cast<int>(count - i) : V::kLanes;
    V::store(y + i, V::add_saturating(V::load(a + i, lanes), V::load(b + i, lanes)), lanes);
  }
}

template <class T>
void maxpool_rows(const Pool& p, const T* image, int row0, int row1, T* out) {
  const size_t channels = p.channels;
  for (int oy = row0; oy < row1; ++oy)
    for (int ox = 0; ox < p.out_width; ++ox, out += channels) {
      bool first = true;
      for (int ky = 0; ky < p.kernel_h; ++ky)
        for (int kx = 0; kx < p.kernel_w; ++kx) {
          const int y = oy * p.stride_h - p.pad_h + ky, x = ox * p.stride_w - p.pad_w + kx;
          if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
          const T* from = image + (static_cast<size_t>(y) * p.width + x) * channels;
          if (first) memcpy(out, from, channels * sizeof(T));
          else
            for (size_t c = 0; c < channels; ++c) out[c] = out[c] > from[c] ? out[c] : from[c];
          first = false;
        }
    }
}

inline void maxpool(const Pool& p, const void* image, int row0, int row1, void* out) {
  if (p.kind == Kind::u8)
    maxpool_rows(p, static_cast<const uint8_t*>(image), row0, row1, static_cast<uint8_t*>(out));
  else if (p.kind == Kind::s8)
    maxpool_rows(p, static_cast<const int8_t*>(image), row0, row1, static_cast<int8_t*>(out));
  else
    maxpool_rows(p, static_cast<const int32_t*>(image), row0, row1, static_cast<int32_t*>(out));
}

// scratch: k^T v, int32 [d, d], then one row of q (k^T v).
inline size_t attention_scratch_bytes(const Attention& a) {
  const size_t d = a.head_channels;
  return sizeof(int32_t) * (d * d + d);
}

// Codes are mostly zero, and a zero needs no row: skip it.
template <class V>
void attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch) {
  const size_t d = a.head_channels, step = a.channels, tokens = a.tokens;
  int32_t* kv = static_cast<int32_t*>(scratch);
  int32_t* acc = kv + d * d;
  memset(kv, 0, d * d * sizeof(int32_t));
  for (size_t n = 0; n < tokens; ++n)
    for (size_t i = 0; i < d; ++i) {
      const int32_t code = k[n * step + i];
      if (code)
        for (size_t j = 0; j < d; ++j) kv[i * d + j] += code * v[n * step + j];
    }
  const typename V::Scale scale(a.shift);
  const typename V::Factor m(a.m), zero(0);
  for (size_t n = 0; n < tokens; ++n) {
    memset(acc, 0, d * sizeof(int32_t));
    for (size_t i = 0; i < d; ++i) {
      const int32_t code = q[n * step + i];
      if (code)
        for (size_t j = 0; j < d; ++j) acc[j] += code * kv[i * d + j];
    }
    for (size_t j = 0; j < d; j += V::kLanes) {
      const int lanes = d - j < V::kLanes ? static_cast<int>(d - j) : V::kLanes;
      V::store(y + n * step + j, V::requant(V::load(acc + j, lanes), m, zero, scale), lanes);
    }
  }
}

// mean, lif, ielif and lookup have no vector version yet: they are a small part of every network measured so far.
template <class V>
constexpr Kernels kernels(const char* name) {
  return {name,
          conv_packed_bytes<V>,
          conv_pack<V>,
          conv_scratch_bytes<V>,
          conv<V>,
          quantize<V>,
          affine<V>,
          add<V>,
          maxpool,
          attention_scratch_bytes,
          attention<V>,
          scalar_mean,
          scalar_lif,
          scalar_ielif,
          scalar_lookup};
}

}  // namespace
}  // namespace bitspike
