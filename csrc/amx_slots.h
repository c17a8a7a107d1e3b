// Convolution by a matrix unit, all but the products: how weights are packed, where codes lie, and how both are cut into tiles (see amx.cc).
#pragma once
#include "amx.h"
#include "tiles.h"

namespace bitspike {
namespace {

constexpr int kMostTiles = 4;  // of windows, and of outputs, whose sums lie in scratch at a time
constexpr int kMostPixels = kMostTiles * kRows;
constexpr size_t kHalf = kDepth / 2;
constexpr size_t kNearWeights = 24 << 10, kNearCodes = 28 << 10;  // bytes that stay in the nearest cache, beside the rest

// Packed: tiles of weights [outputs / 16, an even number][rows][steps], in a step of which lie those of 64 codes of a window's row; then m and b, int32
// [outputs, rounded up to 64], and whether requantization fits.
struct MatrixPacking {
  int rows;
  size_t length, steps, depth;  // codes of a window's row, steps through it, codes of a step
  size_t bytes;
  int8_t* weight;
  int32_t *m, *b, *fits;

  MatrixPacking(const Conv& c, const void* packed) {
    rows = c.kernel_h;
    length = static_cast<size_t>(c.kernel_w) * c.channels;
    steps = (length + kDepth - 1) / kDepth;
    depth = steps > 1 ? kDepth : round_up(length, 4);
    const size_t outputs = round_up(c.outputs, kMostTiles * kRows), tiles = panel() * (round_up(c.outputs, 2 * kRows) / kRows);
    weight = static_cast<int8_t*>(const_cast<void*>(packed));
    m = reinterpret_cast<int32_t*>(weight + tiles * kTile);
    b = m + outputs;
    fits = b + outputs;
    bytes = tiles * kTile + round_up((2 * outputs + 1) * sizeof(int32_t), 64);
  }
  size_t panel() const { return rows * steps; }  // tiles of 16 outputs
};

inline size_t matrix_packed_bytes(const Conv& c) { return MatrixPacking(c, nullptr).bytes; }

inline void matrix_pack(const Conv& c, void* packed) {
  const MatrixPacking p(c, packed);
  memset(packed, 0, p.bytes);
  const int8_t* w = c.weight;
  for (int o = 0; o < c.outputs; ++o) {
    int8_t* tile = p.weight + o / kRows * p.panel() * kTile;
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (size_t first = 0; first < p.length; first += kDepth, tile += kTile)
        for (size_t k = 0; k < kDepth && first + k < p.length; ++k) tile[k / 4 * 64 + o % kRows * 4 + k % 4] = *w++;
  }
  memcpy(p.m, c.m, c.outputs * sizeof(int32_t));
  memcpy(p.b, c.b, c.outputs * sizeof(int32_t));
  *p.fits = requant_fits(c);
}

// Where the codes of a window lie. A window at `place` p of row y has its codes 64 k .. of row ky at (y * stride_h + ky) * row + p * slot + k * step.
struct Slots {
  enum class Kind {
    lines,  // pixels side by side: every window begins on a line, or ends on the one it begins on
    pairs,  // a slot is a line that begins with the codes of its pixel, and goes on with those of the next ones
    rows,   // a slot holds all codes of a window's row; a line, lines, or half of one
  } kind;
  size_t slot, step, row;
  int places;    // from one row of outputs to the next, if a tile goes on into it
  bool across;   // which it does
  size_t count;  // tiles of `rows` rows of outputs

  Slots(const Conv& c, const MatrixPacking& p, int rows) {
    const size_t apart = static_cast<size_t>(c.stride_w) * c.channels, width = padded_width(c);
    across = c.stride_h == 1 && c.stride_w == 1;
    step = kDepth;
    if (far(c, p)) {  // an odd number of lines apart, for those of many windows to lie in all sets of the cache
      kind = Kind::rows, slot = (p.steps | 1) * kDepth, row = c.out_width * slot;
      across = c.stride_h == 1;
    } else if (apart % kDepth == 0 || (p.length <= apart && kDepth % apart == 0)) {
      kind = Kind::lines, slot = apart, row = width * c.channels;
    } else if (c.stride_w == 1 && kDepth % c.channels == 0 && p.steps * kDepth < 2 * p.length) {
      kind = Kind::pairs, slot = kDepth, step = kDepth / c.channels * kDepth, row = width * slot;
    } else {
      kind = Kind::rows, slot = p.depth <= kHalf ? kHalf : p.steps * kDepth, row = c.out_width * slot;
      across = c.stride_h == 1;
    }
    places = kind == Kind::rows ? c.out_width : static_cast<int>(width);
    row_tiles_ = (c.out_width + kRows - 1) / kRows;
    all_ = static_cast<size_t>(rows - 1) * places + c.out_width;
    count = across ? (all_ + kRows - 1) / kRows : static_cast<size_t>(rows) * row_tiles_;
  }
  // Windows of one pixel with many channels, read once for the weights that stay in the nearest cache.
  static bool far(const Conv& c, const MatrixPacking& p) { return c.kernel_h == 1 && c.kernel_w == 1 && 2 * p.panel() * kTile > kNearWeights; }
  size_t all() const { return all_; }
  int row_tiles() const { return row_tiles_; }
  // Whether codes may be read in the picture itself: no tile reads one beyond its last.
  bool in_place(const Conv& c, const MatrixPacking& p, const void* image) const {
    if (c.pad_h || c.pad_w || kind != Kind::lines || reinterpret_cast<uintptr_t>(image) % kDepth) return false;
    return p.length % p.depth == 0 && (across ? all_ >= kMostPixels : static_cast<size_t>(c.out_width) >= kRows);
  }

 private:
  int row_tiles_;
  size_t all_;
};

inline int rows_read(const Conv& c, int rows) { return (rows - 1) * c.stride_h + c.kernel_h; }

inline size_t slots_bytes(const Conv& c, const Slots& s, int rows) {
  // A tile of 16 windows may begin at the last one.
  return round_up(rows_read(c, rows) * s.row + kRows * s.slot + s.step + kSlack, 64);
}

// A padded row of codes, to be cut into slots.
inline size_t line_bytes(const Conv& c) { return round_up(padded_width(c) * c.channels + 2 * kDepth, 64); }

inline void fill_slots(const Conv& c, const MatrixPacking& p, const Slots& s, const uint8_t* image, int first, int rows, uint8_t* line, uint8_t* to) {
  const auto copy = [](uint8_t* dst, const uint8_t* src, size_t n) { memcpy(dst, src, n); };
  const auto pad = [](int16_t v) { return static_cast<uint8_t>(v); };
  if (s.kind == Slots::Kind::lines) return pad_rows(c, image, first, rows, 0, c.channels, to, copy, pad);
  const bool whole = s.kind == Slots::Kind::rows;
  const size_t apart = (whole ? c.stride_w : 1) * static_cast<size_t>(c.channels), lines = whole ? p.steps : 1;
  for (int y = first; y < first + rows; ++y, to += s.row) {
    const uint8_t *row = image + static_cast<ptrdiff_t>(y) * c.width * c.channels, *end = image + static_cast<size_t>(c.height) * c.width * c.channels;
    size_t x = 0;
    const auto fill = [&](const uint8_t* from, size_t until) {
      uint8_t* slot = to + x * s.slot;
      for (; x < until; ++x, slot += s.slot, from += apart)
        if (s.slot == kHalf) _mm256_store_si256(reinterpret_cast<__m256i*>(slot), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        else for (size_t k = 0; k < lines; ++k) _mm512_store_si512(slot + k * kDepth, _mm512_loadu_si512(from + k * kDepth));
    };
    const size_t places = s.places, far = lines * kDepth;  // codes that are read for a slot
    if (!c.pad_h && !c.pad_w) {  // from the picture itself, as long as none is read beyond its end
      const size_t left = static_cast<size_t>(end - row), fit = left < far ? 0 : (left - far) / apart + 1;
      fill(row, fit < places ? fit : places);
      if (x == places) continue;
      memcpy(line, row + x * apart, left - x * apart);
      fill(line, places);
    } else {
      pad_rows(c, image, y, 1, 0, c.channels, line, copy, pad);
      fill(line, places);
    }
  }
}

// Some tiles of windows, and which rows of their sums are whose, in runs of pixels side by side: where the first row of a run begins, and the
// first output of its first pixel.
struct Block {
  struct Run {
    size_t output;
    uint32_t sums, pixels;
  };
  size_t at[kMostTiles];  // the first code of every tile; something where there is none
  int tiles, runs, pixels;
  Run run[kMostPixels];
};

// Where the sums of windows go, `next` sums from row to row. What lies behind the last window is made in full, too, if it can be moved back to
// end with it: then no code behind the last one is read, and what was made before is left out.
class Blocks {
 public:
  Blocks(const Conv& c, const Slots& s, int windows, size_t next, void* list)
      : blocks_(static_cast<Block*>(list)), next_(next), outputs_(c.outputs) {
    const size_t width = c.out_width, all = s.all();
    if (!s.across) {
      for (size_t tile = 0; tile < s.count; ++tile) {
        if (tile % windows == 0) add();
        const size_t y = tile / s.row_tiles(), x = tile % s.row_tiles() * kRows, begin = width < kRows || x + kRows <= width ? x : width - kRows;
        last().at[last().tiles++] = y * c.stride_h * s.row + begin * s.slot;
        put(tile % windows * kRows + x - begin, begin + kRows < width ? kRows - (x - begin) : width - x, y * width + x);
      }
      return;
    }
    size_t y = 0, x = 0, pitch = s.places;  // of the next window
    for (size_t place = 0; place < all; place += last().tiles * kRows) {
      add();
      const size_t left = all - place, wanted = left > 2 * kRows ? windows : 2;
      const size_t tiles = all >= wanted * kRows ? wanted : (left + kRows - 1) / kRows, rows = tiles * kRows;
      const size_t begin = left >= rows || all < rows ? place : all - rows, end = left < rows ? all : place + rows;
      for (size_t i = 0; i < tiles; ++i) last().at[i] = (begin + i * kRows) * s.slot;
      last().tiles = static_cast<int>(tiles);
      for (size_t v = place; v < end;) {
        const size_t row = pitch - x < end - v ? pitch - x : end - v;
        if (x < width) put(v - begin, width - x < row ? width - x : row, y * width + x);
        v += row, x += row;
        if (x == pitch) x = 0, ++y;
      }
    }
  }
  const Block* begin() const { return blocks_; }
  const Block* end() const { return blocks_ + count_; }
  size_t count() const { return count_; }
  static size_t bytes(const Slots& s, int windows) { return round_up((s.count + windows - 1) / windows * sizeof(Block), 64); }

 private:
  void add() { blocks_[count_++].tiles = 0, last().runs = last().pixels = 0, last().at[0] = last().at[1] = last().at[2] = last().at[3] = 0; }
  Block& last() { return blocks_[count_ - 1]; }
  void put(size_t row, size_t count, size_t pixel) {
    Block& b = last();
    b.run[b.runs++] = {pixel * outputs_, static_cast<uint32_t>(row * next_), static_cast<uint32_t>(count)};
    b.pixels += static_cast<int>(count);
  }
  Block* blocks_;
  size_t count_ = 0, next_, outputs_;
};

// What stays in the nearest cache: the weights of some tiles of outputs, and, if they are small, the codes of two tiles of windows, too (near);
// what is read once does not push them out. Or the codes of two tiles of windows stay, or those of four, with weights of one tile of outputs,
// half as many to load (column).
enum class Way { near, codes_once, weights_once, column };

// How a convolution is cut: tiles of windows and of outputs at a time, and rows of a window that are gone through for all of these before the
// next ones.
struct Cut {
  Way way = Way::near;
  int windows = 2, outputs = 2, rows;

  Cut(const Conv& c, const MatrixPacking& p, const Slots& s) : rows(p.rows) {
    const size_t panel = p.panel() * kTile, codes = p.rows * kRows * s.slot;
    if (4 * panel <= kNearWeights) outputs = kMostTiles;
    if (2 * panel <= kNearWeights) return;
    if (Slots::far(c, p)) {
      way = Way::codes_once;
    } else if (2 * codes <= kNearCodes / 2 && c.outputs > 2 * kRows) {
      way = Way::weights_once, outputs = kMostTiles;
    } else {
      way = Way::column, windows = kMostTiles;
      if (windows * codes > kNearCodes) rows = 1;
    }
  }
  size_t row() const { return static_cast<size_t>(outputs) * kRows; }  // sums of a window
  size_t sums() const { return windows * kRows * row(); }
};

}  // namespace
}  // namespace bitspike
