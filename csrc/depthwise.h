// Depthwise convolution. One dot product takes kUnit neighbouring taps of a kernel row for each of kLanes channels, so codes
// are brought into that order first, once per input pixel: vector x of a row holds, for every channel, the codes of
// pixels x .. x + kUnit - 1. Each is used by every kernel row and, for wide kernels, by several groups of taps.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

// Packed: per block of kLanes channels, weights [kernel_h][groups of taps][lanes][unit], then m, b and start, int32; at the very end whether
// requantization fits.
template <class V>
struct DepthwisePacking {
  size_t groups, vectors, block, blocks;  // vectors of weights per block; int32 per block; blocks
  int32_t* data;

  DepthwisePacking(const Conv& c, const void* packed) {
    groups = (c.kernel_w + V::kUnit - 1) / V::kUnit;
    vectors = c.kernel_h * groups;
    block = (vectors + 3) * V::kLanes;
    blocks = (static_cast<size_t>(c.channels) + V::kLanes - 1) / V::kLanes;
    data = static_cast<int32_t*>(const_cast<void*>(packed));
  }
  int32_t* fits() const { return data + blocks * block; }
  size_t bytes() const { return (blocks * block + 1) * sizeof(int32_t); }
};

template <class V>
void depthwise_pack(const Conv& c, void* packed) {
  const DepthwisePacking<V> p(c, packed);
  memset(packed, 0, p.bytes());
  *p.fits() = requant_fits(c);
  const auto offset = static_cast<uint32_t>(c.kind == Kind::s8 ? V::kSignedOffset : V::kUnsignedOffset);
  for (int o = 0; o < c.channels; ++o) {
    int32_t* block = p.data + o / V::kLanes * p.block;
    const int lane = o % V::kLanes;
    uint32_t sum = 0;
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (int kx = 0; kx < c.kernel_w; ++kx) {
        const int8_t w = c.weight[(o * c.kernel_h + ky) * c.kernel_w + kx];
        auto* vector = reinterpret_cast<typename V::Weight*>(block + (ky * p.groups + kx / V::kUnit) * V::kLanes);
        vector[lane * V::kUnit + kx % V::kUnit] = w;
        sum += static_cast<uint32_t>(static_cast<int32_t>(w));
      }
    int32_t* after = block + p.vectors * V::kLanes;
    after[lane] = c.m[o];
    after[V::kLanes + lane] = c.b[o];
    after[2 * V::kLanes + lane] = static_cast<int32_t>(0u - sum * offset);
  }
}

// Output columns are worked on in tiles, so that the rows one window spans stay in the first cache.
struct DepthwiseTiles {
  int width, count;
  size_t row;  // vectors in a row of a tile

  DepthwiseTiles(const Conv& c, size_t groups, int unit) {
    count = (c.out_width + 63) / 64;
    width = (c.out_width + count - 1) / count;
    // Whole blocks of 8 pixels are computed; the last ones of a row may be of no use.
    row = (round_up(width, 8) - 1) * c.stride_w + (groups - 1) * unit + 1;
  }
};

template <class V>
size_t depthwise_scratch_bytes(const Conv& c) {
  const DepthwisePacking<V> p(c, nullptr);
  return c.kernel_h * DepthwiseTiles(c, p.groups, V::kUnit).row * V::kLanes * sizeof(int32_t);
}

// One row of the padded image, from column `left` on, as `count` vectors; `y` may lie outside the image.
template <class V, bool kSigned>
void interleave_row(const Conv& c, const uint8_t* image, int y, int left, size_t count, int channel, int lanes,
                    typename V::I32 pad, int32_t* to) {
  constexpr int kBits = 32 / V::kUnit;
  const auto shift_in = [](typename V::I32 v, typename V::I32 code) {
    return V::or_(V::shift_right_zero(v, kBits), V::shift_left(code, 32 - kBits));
  };
  const bool inside = y >= 0 && y < c.height;
  const uint8_t* row = image + (inside ? static_cast<size_t>(y) * c.width * c.channels : 0) + channel;
  typename V::I32 v = V::zero();
  const int last = left + static_cast<int>(count) + V::kUnit - 1;
  for (int x = left; x < last; ++x) {
    typename V::I32 code = pad;
    if (inside && x >= 0 && x < c.width)
      code = V::template tap_code<kSigned>(row + static_cast<size_t>(x) * c.channels, lanes);
    v = shift_in(v, code);
    if (x - left >= V::kUnit - 1) V::store(to + static_cast<size_t>(x - left - (V::kUnit - 1)) * V::kLanes, v, V::kLanes);
  }
}

// Adds the products of one window for each of kPixels neighbouring outputs. `slot`: where the window's first row is in the
// ring of kernel_h rows, `row` numbers long each. kStride: 1, or 0 for any.
template <class V, int kStride>
void window(const Conv& c, size_t groups, const int32_t* w, const int32_t* x, int slot, size_t row,
            typename V::I32* acc) {
  const size_t step = (kStride ? kStride : c.stride_w) * static_cast<size_t>(V::kLanes);
  const int32_t* from = x + slot * row;
  typename V::I32 a[V::kPixels];
  for (int i = 0; i < V::kPixels; ++i) a[i] = acc[i];
  for (int ky = 0; ky < c.kernel_h; ++ky) {
    const int32_t* at = from;
    for (size_t g = 0; g < groups; ++g, w += V::kLanes, at += V::kUnit * V::kLanes) {
      const typename V::I32 taps = V::load(w);
      for (int i = 0; i < V::kPixels; ++i) a[i] = V::dot(a[i], V::load(at + i * step), taps);
    }
    from = ++slot == c.kernel_h ? (slot = 0, x) : from + row;
  }
  for (int i = 0; i < V::kPixels; ++i) acc[i] = a[i];
}

template <class V, bool kSigned, class Finish>
void depthwise_rows(const Conv& c, const void* packed, const uint8_t* image, int row0, int row1,
                    const Finish& write, int32_t* scratch) {
  const DepthwisePacking<V> p(c, packed);
  const DepthwiseTiles tiles(c, p.groups, V::kUnit);
  const typename V::Scale scale(c.shift);
  constexpr size_t kStep = V::kLanes;
  for (size_t block = 0; block < p.blocks; ++block) {
    const int channel = static_cast<int>(block) * V::kLanes, lanes = at_most(c.channels - channel, V::kLanes);
    const int32_t* weight = p.data + block * p.block;
    const int32_t* after = weight + p.vectors * V::kLanes;
    const Requantize<V, Finish> requantize(write, channel, after, after + V::kLanes);
    const typename V::I32 start = V::load(after + 2 * V::kLanes);
    uint8_t pad_codes[V::kLanes] = {};
    for (int i = 0; i < lanes; ++i) pad_codes[i] = static_cast<uint8_t>(c.pad_value[channel + i]);
    const typename V::I32 pad = V::template tap_code<kSigned>(pad_codes, V::kLanes);
    for (int ox0 = 0; ox0 < c.out_width; ox0 += tiles.width) {
      const int width = at_most(tiles.width, c.out_width - ox0);
      int listed = row0 * c.stride_h - c.pad_h;
      for (int oy = row0; oy < row1; ++oy) {
        const int top = oy * c.stride_h - c.pad_h;
        if (listed < top) listed = top;
        for (; listed < top + c.kernel_h; ++listed)
          interleave_row<V, kSigned>(c, image, listed, ox0 * c.stride_w - c.pad_w, tiles.row, channel, lanes, pad,
                                     scratch + (listed + c.pad_h) % c.kernel_h * tiles.row * kStep);
        const int slot = (top + c.pad_h) % c.kernel_h;
        for (int ox = 0; ox < width; ox += V::kPixels) {
          const int pixels = at_most(V::kPixels, width - ox);
          typename V::I32 acc[V::kPixels];
          for (int i = 0; i < V::kPixels; ++i) acc[i] = start;
          const int32_t* x = scratch + static_cast<size_t>(ox) * c.stride_w * kStep;
          if (c.stride_w == 1) window<V, 1>(c, p.groups, weight, x, slot, tiles.row * kStep, acc);
          else window<V, 0>(c, p.groups, weight, x, slot, tiles.row * kStep, acc);
          for (int i = 0; i < V::kPixels; ++i)
            if (i < pixels)
              write((static_cast<size_t>(oy - row0) * c.out_width + ox0 + ox + i) * c.channels + channel, channel, lanes,
                    requantize(acc[i], scale));
        }
      }
    }
  }
}

template <class V>
void conv_depthwise(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                    void* scratch) {
  const uint8_t* in = static_cast<const uint8_t*>(image);
  int32_t* vectors = static_cast<int32_t*>(scratch);
  with_finish<V>(e, c.outputs, *DepthwisePacking<V>(c, packed).fits(), [&](const auto& write) {
    if (c.kind == Kind::s8) depthwise_rows<V, true>(c, packed, in, row0, row1, write, vectors);
    else depthwise_rows<V, false>(c, packed, in, row0, row1, write, vectors);
  });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

}  // namespace
}  // namespace bitspike
