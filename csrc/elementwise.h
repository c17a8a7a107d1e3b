// The other vector kernels over the primitives of tiles.h. Plain loops here are left to the compiler's vectorizer,
// which has this file's instruction set too; where it would lose (int64 products, saturation) primitives are used.
#pragma once
#include "events.h"
#include "shifts.h"
#include "spin.h"
#include "tiles.h"

namespace bitspike {
namespace {

template <class V>
void quantize(const int32_t* x, size_t rows, size_t channels, const int32_t* m, bool per_channel, int shift, int32_t lo,
              int32_t hi, bool, void* y) {
  // u8 and s8 differ in lo and hi only: the low byte of the clipped code is the code in both.
  const Quantizer quantizer = {m, per_channel, shift, lo, hi};
  finish<V>(x, rows, channels, {nullptr, nullptr, {quantizer, {}}, {static_cast<uint8_t*>(y), nullptr}, {}});
}

template <class V, class Load>
void affine_rows(size_t rows, size_t channels, const int32_t* m, const int32_t* b, bool per_channel, int shift,
                 int32_t* y, Load load) {
  const typename V::Scale scale(shift);
  const typename V::Factor one_m(int64_t{m[0]}), one_b(int64_t{b[0]});
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

// Scratch: v widened, int32 [tokens, d]; then k^T v, int32 [d, d]; both with d rounded up to whole vectors.
template <class V>
size_t attention_scratch_bytes(const Attention& a) {
  const size_t d = a.head_channels;
  return sizeof(int32_t) * round_up(d, V::kLanes) * (a.tokens + d);
}

template <class V>
void attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch) {
  using I32 = typename V::I32;
  constexpr size_t kRows = 4;  // rows per register block; the last block repeats its last row
  const size_t d = a.head_channels, step = a.channels, tokens = a.tokens, width = round_up(d, V::kLanes);
  int32_t* wide = static_cast<int32_t*>(scratch);
  int32_t* kv = wide + tokens * width;
  memset(wide, 0, tokens * width * sizeof(int32_t));
  for (size_t n = 0; n < tokens; ++n)
    for (size_t j = 0; j < d; ++j) wide[n * width + j] = v[n * step + j];
  for (size_t i = 0; i < d; i += kRows) {
    const size_t rows = d - i < kRows ? d - i : kRows;
    const uint8_t* from[kRows];
    for (size_t r = 0; r < kRows; ++r) from[r] = k + i + (r < rows ? r : rows - 1);
    for (size_t j = 0; j < width; j += V::kLanes) {
      I32 acc[kRows] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (size_t n = 0; n < tokens; ++n) {
        const I32 codes = V::load(wide + n * width + j);
        for (size_t r = 0; r < kRows; ++r) acc[r] = V::dot16(acc[r], codes, V::splat(from[r][n * step]));
      }
      for (size_t r = 0; r < rows; ++r) V::store(kv + (i + r) * width + j, acc[r], V::kLanes);
    }
  }
  const typename V::Scale scale(a.shift);
  const typename V::Factor m(int64_t{a.m}), zero(int64_t{0});
  for (size_t n = 0; n < tokens; n += kRows) {
    const size_t rows = tokens - n < kRows ? tokens - n : kRows;
    const uint8_t* from[kRows];
    for (size_t r = 0; r < kRows; ++r) from[r] = q + (n + (r < rows ? r : rows - 1)) * step;
    for (size_t j = 0; j < d; j += V::kLanes) {
      const int lanes = d - j < V::kLanes ? static_cast<int>(d - j) : V::kLanes;
      I32 acc[kRows] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (size_t i = 0; i < d; ++i) {
        const I32 row = V::load(kv + i * width + j);
        for (size_t r = 0; r < kRows; ++r) acc[r] = V::multiply_add(acc[r], row, V::splat(from[r][i]));
      }
      for (size_t r = 0; r < rows; ++r) V::store(y + (n + r) * step + j, V::requant(acc[r], m, zero, scale), lanes);
    }
  }
}

constexpr int kCountedEntries = 63;  // of a table of potentials: more are sooner searched than compared with all

// The steps of a few neurons at a time: their potentials stay in registers.
template <class V>
void lif_packed(const PackedLif& packed, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using I32 = typename V::I32;
  if (packed.table && packed.entries > kCountedEntries) return scalar_lif_packed(packed, x, count, x_stride, y, y_stride);
  const Lif& p = packed.lif;
  const typename V::Factor decay(int64_t{p.decay_m}), gain(int64_t{p.gain_m}), one(int64_t{1});
  const typename V::Factor minus_amount(-int64_t{packed.amount});
  const typename V::Scale decay_scale(p.decay_s), gain_scale(p.gain_s), unit(0);
  const I32 threshold = V::splat(p.threshold), all = V::splat(packed.entries - packed.entries / 2);
  for (size_t i = 0; i < count; i += V::kLanes) {
    const int lanes = count - i < V::kLanes ? static_cast<int>(count - i) : V::kLanes;
    I32 v = V::zero();
    for (int t = 0; t < p.steps; ++t) {
      const typename V::Factor drive = V::shifted(V::load(x + t * x_stride + i, lanes), gain, gain_scale);
      const I32 h = V::requant(v, decay, drive, decay_scale);
      const I32 spike = p.strict ? V::more(h, threshold) : V::not_(V::more(threshold, h));
      V::store_codes(y + t * y_stride + i, V::and_(spike, V::splat(1)), lanes);
      v = h;
      if (p.reset == Lif::Reset::hard) v = V::select(spike, V::zero(), h);
      if (p.reset == Lif::Reset::soft) v = V::select(spike, V::requant(h, one, minus_amount, unit), h);
      if (packed.table) {
        I32 code = all;
        for (int e = 0; e < packed.entries; ++e) code = V::add(code, V::more(V::splat(packed.table[e]), v));  // -1 if above
        v = code;
      }
    }
  }
}

template <class V>
void lif(const Lif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  lif_packed<V>({p, p.threshold, nullptr, 0}, x, count, x_stride, y, y_stride);
}

template <class V>
void ielif(const IeLif& p, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride) {
  using I32 = typename V::I32;
  const typename V::Factor decay(int64_t{p.decay_m}), one(int64_t{1}), zero(int64_t{0});
  const typename V::Scale decay_scale(p.decay_s), fraction(p.fraction_bits);
  for (size_t i = 0; i < count; i += V::kLanes) {
    const int lanes = count - i < V::kLanes ? static_cast<int>(count - i) : V::kLanes;
    I32 v = V::zero();
    for (int t = 0; t < p.steps; ++t) {
      const I32 u = V::add_saturating(v, V::load(x + t * x_stride + i, lanes));
      const I32 n = V::clip(V::requant(u, one, zero, fraction), 0, p.levels);
      V::store_codes(y + t * y_stride + i, n, lanes);
      // n << F may wrap, the difference does not: n is u rounded or less, so it lies in -2^(F-1) .. u.
      v = V::requant(V::sub(u, V::shift_left(n, p.fraction_bits)), decay, zero, decay_scale);
    }
  }
}

// mean and lookup have no vector version: they are a small part of every network.
template <class V>
constexpr Kernels kernels(const char* name, ConvKernel popcount) {
  return {name,
          {dense_kernel<V>(),
           narrow_kernel<V>(),
           {events_supported<V>, events_packed_bytes<V>, events_pack<V>, events_scratch_bytes<V>, conv_events<V>},
           popcount,
           tiles_kernel<ShiftOf<V>>([](const Conv& c) { return may_support(Variant::shift, c); })},
          finish<V>,
          quantize<V>,
          affine<V>,
          add<V>,
          maxpool,
          attention_scratch_bytes<V>,
          attention<V>,
          scalar_mean,
          lif<V>,
          lif_packed<V>,
          ielif<V>,
          scalar_lookup,
          spin<V>};
}

}  // namespace
}  // namespace bitspike
