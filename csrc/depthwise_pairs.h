// Depthwise convolution of stride 1 in 16 bits: codes of two neighbouring rows lie side by side, and one instruction multiplies both
// with their weights and adds the products, for 16 channels (AVX2).
//
// Bound: kernel_h * kernel_w * largest weight * largest code <= 32767 (both as magnitudes; s8 codes count as 255, since they are
// code + 128 here), so that no sum of products can leave 16 bits, in whatever order.
#pragma once
#include "padded_row.h"

namespace bitspike {
namespace {

constexpr int kPairPixels = 4;    // outputs at a time
constexpr int kPairColumns = 32;  // of outputs at most, so that what their windows read stays in the nearest cache
constexpr int kMostPairs = 4;     // of rows in a window

template <class V>
bool pairs_fit(const Conv& c) {
  if (c.stride_h != 1 || c.stride_w != 1) return false;
  if ((c.kernel_w != 3 && c.kernel_w != 5 && c.kernel_w != 7) || c.kernel_h < 2 || c.kernel_h > 2 * kMostPairs) return false;
  if (c.channels < V::kBytes - V::kBytes / 4) return false;  // most of a vector would be empty
  const int64_t weight = c.most_weight(), code = c.kind == Kind::s8 ? 255 : c.hi;
  return c.kernel_h * c.kernel_w * weight * code <= INT16_MAX;
}

// Packed: per block of kBytes channels the weights [pairs of rows][low, high][kernel_w][kBytes], of which a vector holds those of
// two rows side by side; then start, m and b, int32 [blocks * kBytes], and whether requantization fits. Pairs are those from row 0, 2,
// 4 ... of the window on; of an odd number of rows the last pair holds the last row and, with weights of 0, the one before.
template <class V>
struct PairPacking {
  int pairs;
  size_t vectors, blocks, bytes;  // vectors of weights per block
  int8_t* weight;
  int32_t *start, *m, *b, *fits;

  int row(const Conv& c, int pair) const { return 2 * pair + 2 > c.kernel_h ? c.kernel_h - 2 : 2 * pair; }  // its first, in the window
  PairPacking(const Conv& c, const void* packed) {
    pairs = (c.kernel_h + 1) / 2;
    vectors = static_cast<size_t>(pairs) * 2 * c.kernel_w;
    blocks = (static_cast<size_t>(c.channels) + V::kBytes - 1) / V::kBytes;
    weight = static_cast<int8_t*>(const_cast<void*>(packed));
    start = reinterpret_cast<int32_t*>(weight + blocks * vectors * V::kBytes);
    m = start + blocks * V::kBytes;
    b = m + blocks * V::kBytes;
    fits = b + blocks * V::kBytes;
    bytes = blocks * (vectors + 3 * sizeof(int32_t)) * V::kBytes + 64;
  }
};

template <class V>
void pairs_pack(const Conv& c, void* packed) {
  const PairPacking<V> p(c, packed);
  memset(packed, 0, p.bytes);
  *p.fits = requant_fits(c);
  for (int o = 0; o < c.channels; ++o) {
    int8_t* const block = p.weight + o / V::kBytes * p.vectors * V::kBytes;
    // Rows are laid side by side within 16 bytes: 8 channels in the low vector, 8 in the high one.
    const int byte = o % V::kBytes, high = byte % 16 / 8, at = byte / 16 * 16 + byte % 8 * 2;
    int32_t sum = 0;
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (int kx = 0; kx < c.kernel_w; ++kx) {
        const int8_t w = c.weight[(static_cast<size_t>(o) * c.kernel_h + ky) * c.kernel_w + kx];
        const int second = c.kernel_h % 2 && ky + 1 == c.kernel_h ? 1 : ky % 2;
        block[((ky / 2 * 2 + high) * c.kernel_w + kx) * V::kBytes + at + second] = w;
        sum += w;
      }
    p.start[o] = c.kind == Kind::s8 ? -128 * sum : 0;
    p.m[o] = c.m[o];
    p.b[o] = c.b[o];
  }
}

// For kBytes channels: the newest row, [width], every pair of neighbouring rows of a window, [kernel_h - 1][low, high][width], and sums of
// int16 for a stretch of outputs.
template <class V>
struct PairScratch {
  int stretches, outputs;  // of a row, and of one of them
  size_t width, bytes;     // columns that the windows of a stretch span
  uint8_t *row, *pairs;
  int16_t* sums;

  PairScratch(const Conv& c, void* scratch) {
    stretches = (c.out_width + kPairColumns - 1) / kPairColumns;
    outputs = (c.out_width + stretches - 1) / stretches;
    width = round_up(outputs, kPairPixels) + c.kernel_w - 1;
    row = static_cast<uint8_t*>(scratch);
    pairs = row + width * V::kBytes;
    sums = reinterpret_cast<int16_t*>(pairs + (c.kernel_h - 1) * 2 * width * V::kBytes);
    bytes = (2 * c.kernel_h + 1) * width * V::kBytes;
  }
  uint8_t* pair(const Conv& c, int y) const { return pairs + (y + c.pad_h) % (c.kernel_h - 1) * 2 * width * V::kBytes; }  // rows y, y + 1
};

// Row y of the padded image, columns [left, left + width), `lanes` channels from `channel` on, as unsigned codes: they take the place of
// those of the row before, after both were laid side by side at `low` and, `width` vectors behind it, `high`.
template <class V>
void pairs_row(const Conv& c, const uint8_t* image, int y, int left, size_t width, int channel, int lanes, typename V::I32 pad,
               uint8_t* before, uint8_t* low) {
  uint8_t* high = low + width * V::kBytes;
  const auto put = [&](typename V::I32 v) {
    const typename V::I32 above = V::load_bytes(reinterpret_cast<const int8_t*>(before));
    V::store_bytes(low, V::side_by_side_low(above, v));
    V::store_bytes(high, V::side_by_side_high(above, v));
    V::store_bytes(before, v);
    before += V::kBytes, low += V::kBytes, high += V::kBytes;
  };
  padded_row<V>(c, image, y, left, width, channel, lanes, pad, put);
}

// Sums of `count` outputs of a row, [count][kBytes], channels in their order.
template <class V, int kWidth>
BITSPIKE_NOINLINE void pair_sums(const uint8_t* const* pairs, int rows, size_t width, size_t count, const int8_t* weight, int16_t* sums) {
  using I32 = typename V::I32;
  for (size_t x = 0; x < count; x += kPairPixels) {
    I32 acc[2][kPairPixels];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kPairPixels; ++i) acc[half][i] = V::zero();
    const int8_t* w = weight;
    for (int pair = 0; pair < rows; ++pair) {
      const uint8_t* from = pairs[pair] + x * V::kBytes;
      for (int half = 0; half < 2; ++half, from += width * V::kBytes) {
        I32 codes[kPairPixels + kWidth - 1];
        for (int i = 0; i < kPairPixels + kWidth - 1; ++i) codes[i] = V::load_bytes(reinterpret_cast<const int8_t*>(from + i * V::kBytes));
        for (int k = 0; k < kWidth; ++k, w += V::kBytes) {
          const I32 taps = V::load_bytes(w);
          for (int i = 0; i < kPairPixels; ++i) acc[half][i] = V::add16(acc[half][i], V::multiply_pairs(codes[i + k], taps));
        }
      }
    }
    for (int i = 0; i < kPairPixels; ++i, sums += V::kBytes) V::store_in_order(sums, acc[0][i], acc[1][i]);
  }
}

template <class V, class Finish>
void pairs_rows(const Conv& c, const PairPacking<V>& p, const uint8_t* image, int row0, int row1, const Finish& write, void* scratch) {
  const PairScratch<V> s(c, scratch);
  const typename V::Scale scale(c.shift);
  const auto sum = c.kernel_w == 3 ? pair_sums<V, 3> : c.kernel_w == 5 ? pair_sums<V, 5> : pair_sums<V, 7>;
  for (size_t block = 0; block < p.blocks; ++block) {
    const int channel = static_cast<int>(block) * V::kBytes, lanes = at_most(c.channels - channel, V::kBytes);
    const int8_t* weight = p.weight + block * p.vectors * V::kBytes;
    const typename V::I32 pad = pad_of<V>(c, channel, lanes);
    for (int left = 0; left < c.out_width; left += s.outputs) {
      const int width = at_most(c.out_width - left, s.outputs);
      int listed = row0 - c.pad_h;
      for (int oy = row0; oy < row1; ++oy) {
        const int top = oy - c.pad_h;
        for (; listed < top + c.kernel_h; ++listed)  // the first row has none before it: what it makes is overwritten
          pairs_row<V>(c, image, listed, left - c.pad_w, s.width, channel, lanes, pad, s.row, s.pair(c, listed == -c.pad_h ? listed : listed - 1));
        const uint8_t* pairs[kMostPairs];
        for (int i = 0; i < p.pairs; ++i) pairs[i] = s.pair(c, top + p.row(c, i));
        sum(pairs, p.pairs, s.width, width, weight, s.sums);
        const size_t y = (static_cast<size_t>(oy - row0) * c.out_width + left) * c.channels;
        for (int first = 0; first < lanes; first += V::kLanes) {
          const int o = channel + first;
          const Requantize<V, Finish> requantize(write, o, p.m + o, p.b + o);
          const typename V::I32 start = V::load(p.start + o);
          const auto all = [&](int some) {
            size_t to = y + o;
            for (int x = 0; x < width; ++x, to += c.channels)
              write(to, o, some, requantize(V::add(V::widen_s16(s.sums + static_cast<size_t>(x) * V::kBytes + first), start), scale));
          };
          if (lanes - first >= V::kLanes) all(V::kLanes);  // a number that the compiler knows
          else all(lanes - first);
        }
      }
    }
  }
}

template <class V>
void conv_pairs(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
  const PairPacking<V> p(c, packed);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  with_finish<V>(e, c.outputs, *p.fits, [&](const auto& write) { pairs_rows<V>(c, p, codes, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

}  // namespace
}  // namespace bitspike
