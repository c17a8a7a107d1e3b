// The other vector kernels over the primitives of tiles.h. Plain loops here are left to the compiler's vectorizer,
// which has this file's instruction set too; where it would lose (int64 products, saturation) primitives are used.
#pragma once
#include "attention.h"
#include "events.h"
#include "lif_sums.h"
#include "sliced.h"
#include "winograd.h"
#include "maps.h"
#include "neurons.h"
#include "shifts.h"
#include "spin.h"
#include "tiles.h"

namespace bitspike {
namespace {

template <class V>
void quantize(const int32_t* x, size_t rows, size_t channels, const int32_t* m, bool per_channel, int shift, int32_t lo,
              int32_t hi, bool, void* y) {
  // u8 and s8 differ in lo and hi only: the low byte of the clipped code is the code in both.
  Epilogue e{};
  e.quantizer[0] = {m, per_channel, shift, lo, hi};
  e.codes[0] = static_cast<uint8_t*>(y);
  finish<V>(x, rows, channels, e);
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

// The window [y0, y1) x [x0, x1) of kCount channels: a number that the compiler knows, so that they stay in registers.
template <int kCount, class T>
void maxpool_channels(const T* image, size_t row, size_t channels, int y0, int y1, int x0, int x1, T* out) {
  T best[kCount];
  memcpy(best, image + y0 * row + x0 * channels, sizeof(best));
  for (int y = y0; y < y1; ++y)
    for (int x = x0; x < x1; ++x) {
      const T* from = image + y * row + x * channels;
      for (int c = 0; c < kCount; ++c) best[c] = best[c] > from[c] ? best[c] : from[c];
    }
  memcpy(out, best, sizeof(best));
}

template <class T>
void maxpool_rows(const Pool& p, const T* image, int row0, int row1, T* out) {
  constexpr int kMost = 64 / sizeof(T), kSome = 16 / sizeof(T);
  const int channels = p.channels;
  const size_t row = static_cast<size_t>(p.width) * channels;
  const auto inside = [](int i, int size) { return i < 0 ? 0 : i < size ? i : size; };
  for (int oy = row0; oy < row1; ++oy) {
    const int top = oy * p.stride_h - p.pad_h, y0 = inside(top, p.height), y1 = inside(top + p.kernel_h, p.height);
    for (int ox = 0; ox < p.out_width; ++ox, out += channels) {
      const int left = ox * p.stride_w - p.pad_w, x0 = inside(left, p.width), x1 = inside(left + p.kernel_w, p.width);
      int c = 0;
      for (; c + kMost <= channels; c += kMost) maxpool_channels<kMost>(image + c, row, channels, y0, y1, x0, x1, out + c);
      for (; c + kSome <= channels; c += kSome) maxpool_channels<kSome>(image + c, row, channels, y0, y1, x0, x1, out + c);
      for (; c < channels; ++c) maxpool_channels<1>(image + c, row, channels, y0, y1, x0, x1, out + c);
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

// The mean of a power of two, 2^shift, of rows: a shift where others divide. A block of columns at a time, for the compiler to
// make vectors of.
template <class T>
void mean_shifted(const T* x, size_t rows, int shift, size_t columns, size_t row_stride, int32_t m, int32_t* y) {
  constexpr size_t kSome = 64;
  for (size_t first = 0; first < columns; first += kSome, x += kSome, y += kSome) {
    const size_t count = columns - first < kSome ? columns - first : kSome;
    int64_t sum[kSome] = {};
    for (size_t r = 0; r < rows; ++r)
      for (size_t c = 0; c < count; ++c) sum[c] += x[r * row_stride + c];
    for (size_t c = 0; c < count; ++c) {
      const int64_t mean = (int64_t{2} * m * sum[c] + (int64_t{1} << shift)) >> (shift + 1);
      y[c] = mean > INT32_MAX ? INT32_MAX : mean < INT32_MIN ? INT32_MIN : static_cast<int32_t>(mean);
    }
  }
}

inline void mean(Kind kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y) {
  int shift = 0;
  while (size_t{1} << shift < rows) ++shift;
  if (size_t{1} << shift != rows || shift > 30) return scalar_mean(kind, x, rows, columns, row_stride, m, y);
  if (kind == Kind::u8) mean_shifted(static_cast<const uint8_t*>(x), rows, shift, columns, row_stride, m, y);
  else if (kind == Kind::s8) mean_shifted(static_cast<const int8_t*>(x), rows, shift, columns, row_stride, m, y);
  else mean_shifted(static_cast<const int32_t*>(x), rows, shift, columns, row_stride, m, y);
}

template <class V>
constexpr Kernels kernels(const char* name, ConvKernel popcount, ConvKernel sliced = sliced_kernel<V>(),
                          MapKernel maps = map_kernel<V>(),
                          void (*lookup)(const uint8_t*, size_t, size_t, const int8_t*, int8_t*) = scalar_lookup) {
  return {name,
          {dense_kernel<V>(),
           narrow_kernel<V>(),
           {events_supported<V>, events_packed_bytes<V>, events_pack<V>, events_scratch_bytes<V>, conv_events<V>},
           sliced,
           popcount,
           tiles_kernel<ShiftOf<V>>([](const Conv& c) { return may_support(Variant::shift, c); }),
           winograd_kernel<V>()},
          finish<V>,
          quantize<V>,
          affine<V>,
          add<V>,
          maxpool,
          attention_scratch_bytes<V>,
          attention<V>,
          maps,
          mean,
          lif<V>,
          lif_packed<V>,
          sums_kernel<V>(),
          ielif<V>,
          lookup,
          true,
          V::kBytes,
          V::kCarrySave,
          spin<V>};
}

}  // namespace
}  // namespace bitspike
