// Convolution by a matrix unit (AMX): `tdpbusd` and `tdpbssd` multiply 16 rows of 64 codes by 64 rows of 16 weights, 16,384 products, and
// add them to 16 x 16 sums of int32, in 16 cycles. Eight registers of 1 KiB, *tiles*: four of sums, the others of codes and weights.
//
// The rows of a tile of codes are windows of 16 output pixels, or rather 64 codes of one of their rows, which begin a constant distance
// apart. What is read is 16 lines of the cache, in 8 cycles if no row of the tile crosses a line, in 50 if they do; so codes are read where
// they lie only if every window begins on a line, and copied into *slots*, one for every place that a window may begin at, otherwise.
//
// With stride 1 a tile goes on into the next row of the picture: the places between the last window of a row and the first of the next are
// computed, too, and thrown away (2 of 58 for 3x3 on 56 pixels). Otherwise a tile lies within a row.
#include "amx_pixels.h"

namespace bitspike {
namespace {

size_t matrix_scratch_bytes(const Conv& c, int rows) {
  const MatrixPacking p(c, nullptr);
  const Slots s(c, p, rows);
  const Cut cut(c, p, s);
  return 2 * cut.sums() * sizeof(int32_t) + Blocks::bytes(s, cut.windows) + line_bytes(c) + slots_bytes(c, s, rows);
}

// What is left to do of the sums of a block, while the products of the next one are made: vectors and tiles have units of their own.
template <class Pixel>
struct Left {
  const size_t row, outputs;      // from pixel to pixel: sums, outputs
  const char *ahead, *ahead_end;  // what other convolutions will read
  int lines;                      // of it to fetch at every step
  const Pixel* pixel;
  int first = 0;                  // output
  int pixels = 0, run = 0;        // all, and of the run at hand
  const int32_t *block = nullptr, *sums = nullptr;
  size_t output = 0;
  const Block::Run *next = nullptr, *end = nullptr;
  size_t nonzero = Bytes::kUncounted;

  void begin(const Block& b, const int32_t* its_sums, const Pixel* its_pixel, int its_first) {
    block = its_sums, pixel = its_pixel, first = its_first, pixels = b.pixels, next = b.run, end = b.run + b.runs;
    go_on();
  }
  void go_on() {  // with the next run
    run = 0;
    if (next < end) sums = block + next->sums, output = next->output + first, run = next->pixels, ++next;
  }
};

template <class Pixel, class Finish>
BITSPIKE_NOINLINE void all_pixels(const Finish& write, Left<Pixel>& left) {
  for (; left.run; left.go_on())
    for (; left.run; --left.run, left.sums += left.row, left.output += left.outputs)
      (*left.pixel)(write, left.sums, left.output, left.first, left.nonzero);
}

// How the functions below go through a window and a panel: some of its rows, and of the steps through each.
struct Walk {
  size_t slot, step, row;  // of Slots
  int rows;
  size_t steps, panel;  // panel: bytes from one tile of outputs to the next
};

// Numbers written one by one are read one by one: as a whole vector they would have to be in the cache, where they come only after all the
// sums before them.
using Codes = const uint8_t* const (&)[kMostTiles];

#define BITSPIKE_PRODUCTS(sums, codes, weights)                 \
  if (kSigned) _tile_dpbssd(sums, codes, weights);            \
  else _tile_dpbusd(sums, codes, weights);

// What is read once only need not push anything else out of the nearest cache.
#define BITSPIKE_FROM(once, tile, from, step) \
  if (once) _tile_stream_loadd(tile, from, step); \
  else _tile_loadd(tile, from, step);

// Some other work to do at every step.
struct Idle {
  void operator()() const {}
};

// The sums of one or two tiles of windows and two of outputs, `next` bytes from row to row: a load serves two products.
template <bool kSigned, Way kWay, int kCodes, class Meanwhile>
BITSPIKE_INLINE void products_square(const Walk& o, const uint8_t* x0, const uint8_t* x1, const int8_t* w0, int32_t* sums, size_t next,
                                     Meanwhile meanwhile) {
  const int8_t* w1 = w0 + o.panel;
  const size_t slot = o.slot, step = o.step, row = o.row - o.steps * step, steps = o.steps;
  int32_t *const low = sums + kRows * next / sizeof(int32_t);
  _tile_zero(0);
  _tile_zero(1);
  if (kCodes > 1) _tile_zero(2);
  if (kCodes > 1) _tile_zero(3);
  for (int ky = o.rows; ky > 0; --ky, x0 += row, x1 += row)
    for (size_t k = steps; k > 0; --k, x0 += step, x1 += step, w0 += kTile, w1 += kTile) {
      BITSPIKE_FROM(kWay == Way::weights_once, 6, w0, 64)
      BITSPIKE_FROM(kWay == Way::codes_once, 4, x0, slot)
      BITSPIKE_PRODUCTS(0, 4, 6)
      BITSPIKE_FROM(kWay == Way::weights_once, 7, w1, 64)
      BITSPIKE_PRODUCTS(1, 4, 7)
      if (kCodes > 1) {
        BITSPIKE_FROM(kWay == Way::codes_once, 5, x1, slot)
        BITSPIKE_PRODUCTS(2, 5, 6)
        BITSPIKE_PRODUCTS(3, 5, 7)
      }
      meanwhile();
    }
  _tile_stored(0, sums, next);
  _tile_stored(1, sums + kRows, next);
  if (kCodes > 1) _tile_stored(2, low, next);
  if (kCodes > 1) _tile_stored(3, low + kRows, next);
}

// Of four tiles of windows and one of outputs. more: to sums that are there. Codes begin `from` bytes behind those given.
template <bool kSigned, class Meanwhile>
BITSPIKE_INLINE void products_column(const Walk& o, Codes codes, size_t from, const int8_t* w, bool more, int32_t* sums, size_t next,
                                     Meanwhile meanwhile) {
  const uint8_t *x0 = codes[0] + from, *x1 = codes[1] + from, *x2 = codes[2] + from, *x3 = codes[3] + from;
  const size_t slot = o.slot, step = o.step, row = o.row - o.steps * step, steps = o.steps;
  int32_t *const sums1 = sums + kRows * next / sizeof(int32_t), *const sums2 = sums1 + kRows * next / sizeof(int32_t),
          *const sums3 = sums2 + kRows * next / sizeof(int32_t);
  if (more) {
    _tile_loadd(0, sums, next);
    _tile_loadd(1, sums1, next);
    _tile_loadd(2, sums2, next);
    _tile_loadd(3, sums3, next);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int ky = o.rows; ky > 0; --ky, x0 += row, x1 += row, x2 += row, x3 += row)
    for (size_t k = steps; k > 0; --k, x0 += step, x1 += step, x2 += step, x3 += step, w += kTile) {
      BITSPIKE_FROM(true, 6, w, 64)
      _tile_loadd(4, x0, slot);
      BITSPIKE_PRODUCTS(0, 4, 6)
      _tile_loadd(5, x1, slot);
      BITSPIKE_PRODUCTS(1, 5, 6)
      _tile_loadd(4, x2, slot);
      BITSPIKE_PRODUCTS(2, 4, 6)
      _tile_loadd(5, x3, slot);
      BITSPIKE_PRODUCTS(3, 5, 6)
      meanwhile();
    }
  _tile_stored(0, sums, next);
  _tile_stored(1, sums1, next);
  _tile_stored(2, sums2, next);
  _tile_stored(3, sums3, next);
}
#undef BITSPIKE_PRODUCTS
#undef BITSPIKE_FROM

// One block whose tiles are all there, in the meantime what is left of the one before.
template <bool kSigned, Way kWay, class Pixel, class Finish>
BITSPIKE_NOINLINE void whole_block(const Walk& all, int rows, int outputs, size_t next, Codes codes, const int8_t* weights, int32_t* sums,
                                   const Finish& write, Left<Pixel>& left) {
  const Pixel pixel = *left.pixel;
  const Finish finish = write;  // copies, for the compiler to know that nothing that is stored changes them
  const int32_t* from = left.sums;
  const size_t row = left.row, apart = left.outputs;
  size_t output = left.output, nonzero = left.nonzero;
  const int first = left.first, passes = kWay == Way::column ? outputs : outputs / 2;
  const int steps = passes * all.rows * static_cast<int>(all.steps), each = (left.pixels + steps - 1) / steps, lines = left.lines;
  int run = left.run;
  const char* ahead = left.ahead;
  const auto meanwhile = [&] {
    for (int i = 0; i < lines; ++i, ahead += 64) Avx512::prefetch(ahead);
    const int some = each < run ? each : run;
    run -= some;
    for (int i = 0; i < some; ++i, from += row, output += apart) pixel(finish, from, output, first, nonzero);
    if (!run) left.go_on(), from = left.sums, output = left.output, run = left.run;
  };
  memory_barrier();
  if (kWay == Way::column) {
    Walk part = all;
    for (int y = 0; y < all.rows; y += rows) {
      part.rows = at_most(rows, all.rows - y);
      for (int n = 0; n < passes; ++n)
        products_column<kSigned>(part, codes, y * all.row, weights + n * all.panel + y * all.steps * kTile, y > 0, sums + n * kRows, next, meanwhile);
    }
  } else {
    for (int n = 0; n < passes; ++n)
      products_square<kSigned, kWay, 2>(all, codes[0], codes[1], weights + 2 * n * all.panel, sums + 2 * n * kRows, next, meanwhile);
  }
  memory_barrier();
  left.sums = from, left.output = output, left.run = run, left.nonzero = nonzero, left.ahead = ahead;
  if (ahead >= left.ahead_end) left.lines = 0;
}

// One tile or three.
template <bool kSigned>
BITSPIKE_NOINLINE void part_of_block(const Walk& o, Codes codes, const int8_t* weights, int windows, int outputs, size_t next, int32_t* sums) {
  memory_barrier();
  for (int i = 0; i < windows; i += 2, sums += 2 * kRows * next / sizeof(int32_t))
    for (int n = 0; n < outputs; n += 2) {
      const int8_t* const w = weights + n * o.panel;
      if (i + 1 < windows) products_square<kSigned, Way::near, 2>(o, codes[i], codes[i + 1], w, sums + n * kRows, next, Idle());
      else products_square<kSigned, Way::near, 1>(o, codes[i], codes[i], w, sums + n * kRows, next, Idle());
    }
  memory_barrier();
}

// All blocks of a convolution, its codes in slots. Pixel: of cut.outputs tiles of outputs. Returns how many codes are not 0, if `nonzero` is 0 and
// Pixel counts, or kUncounted.
template <bool kSigned, class Pixel, class Finish>
size_t matrix_blocks(const Conv& c, const MatrixPacking& p, const Cut& cut, const Walk& walk, const Blocks& blocks, const uint8_t* codes,
                     size_t nonzero, const Finish& write, int32_t* sums) {
  Pixel pixels[2] = {Pixel(c, p, write, 0), Pixel(c, p, write, 0)};  // of this group of outputs and of the one before
  const size_t lines = (c.ahead_end - c.ahead) / 64, steps = blocks.count() * (c.outputs + kRows - 1) / kRows * p.panel() / (cut.way == Way::column ? 1 : 2) + 1;
  Left<Pixel> left{cut.row(), static_cast<size_t>(c.outputs), c.ahead, c.ahead_end, static_cast<int>((lines + steps - 1) / steps), &pixels[1]};
  left.nonzero = nonzero;
  const size_t next = cut.row() * sizeof(int32_t);
  const auto four = whole_block<kSigned, Way::column, Pixel, Finish>;
  const auto two = cut.way == Way::codes_once     ? whole_block<kSigned, Way::codes_once, Pixel, Finish>
                   : cut.way == Way::weights_once ? whole_block<kSigned, Way::weights_once, Pixel, Finish>
                                                  : whole_block<kSigned, Way::near, Pixel, Finish>;
  int turn = 0;
  for (int first = 0; first < c.outputs; first += Pixel::kOutputs) {
    const int outputs = static_cast<int>(round_up(at_most(c.outputs - first, Pixel::kOutputs), 2 * kRows)) / kRows;
    const int8_t* const weights = p.weight + first / kRows * p.panel() * kTile;
    Pixel* const pixel = &pixels[first / Pixel::kOutputs % 2];
    *pixel = Pixel(c, p, write, first);
    for (const Block* b = blocks.begin(); b < blocks.end(); ++b, turn ^= 1) {
      int32_t* const to = sums + turn * cut.sums();
      const uint8_t* windows[kMostTiles] = {codes + b->at[0], codes + b->at[1], codes + b->at[2], codes + b->at[3]};
      if (b->tiles == kMostTiles) four(walk, cut.rows, outputs, next, windows, weights, to, write, left);
      else if (b->tiles == 2) two(walk, cut.rows, outputs, next, windows, weights, to, write, left);
      else part_of_block<kSigned>(walk, windows, weights, b->tiles, outputs, next, to);
      all_pixels(write, left);
      left.begin(*b, to, pixel, first);
    }
  }
  all_pixels(write, left);
  return Pixel::kCounts ? left.nonzero : Bytes::kUncounted;
}

template <bool kFew, class Finish>
size_t matrix_rows(const Conv& c, const MatrixPacking& p, const uint8_t* image, int row0, int row1, size_t nonzero, const Finish& write, void* scratch) {
  const Slots slots(c, p, row1 - row0);
  const Cut cut(c, p, slots);
  int32_t* const sums = static_cast<int32_t*>(scratch);
  char* const list = reinterpret_cast<char*>(sums + 2 * cut.sums());
  const uint8_t* codes = image + static_cast<size_t>(row0) * c.stride_h * slots.row;
  if (!slots.in_place(c, p, codes)) {
    uint8_t *line = reinterpret_cast<uint8_t*>(list) + Blocks::bytes(slots, cut.windows), *to = line + line_bytes(c);
    fill_slots(c, p, slots, image, row0 * c.stride_h - c.pad_h, rows_read(c, row1 - row0), line, to);
    codes = to;
  }
  const TileConfig config(p.depth);
  memory_barrier();
  _tile_loadconfig(&config);
  using Four = PixelOf<Finish, 4, kFew>;
  using Two = PixelOf<Finish, 2, kFew>;
  const Walk walk{slots.slot, slots.step, slots.row, p.rows, p.steps, p.panel() * kTile};
  const Blocks blocks(c, slots, cut.windows, cut.row(), list);
  const bool is_signed = c.kind == Kind::s8;
  const auto run = cut.outputs == 2 ? is_signed ? matrix_blocks<true, Two, Finish> : matrix_blocks<false, Two, Finish>
                                    : is_signed ? matrix_blocks<true, Four, Finish> : matrix_blocks<false, Four, Finish>;
  const size_t found = run(c, p, cut, walk, blocks, codes, nonzero, write, sums);
  _tile_release();
  return found;
}

void conv_matrix(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e, void* scratch) {
  const MatrixPacking p(c, packed);
  const uint8_t* in = static_cast<const uint8_t*>(image);
  size_t found = Bytes::kUncounted;
  with_finish<Avx512>(e, c.outputs, *p.fits, [&](const auto& write) {
    using Finish = std::decay_t<decltype(write)>;
    auto run = matrix_rows<true, Finish>;
    if constexpr (Finish::kUsualCodes)
      if (c.shift > kMostShift) run = matrix_rows<false, Finish>;
    found = run(c, p, in, row0, row1, e.nonzero[0] ? 0 : Bytes::kUncounted, write, scratch);
  });
  if (found == Bytes::kUncounted) count_nonzero<Avx512>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
  else *e.nonzero[0] += found;
}

}  // namespace

constexpr ConvKernel matrix_amx = {[](const Conv& c) { return may_support(Variant::matrix, c); }, matrix_packed_bytes, matrix_pack,
                                      matrix_scratch_bytes, conv_matrix};

// 16,384 products an instruction, on four tiles of sums, as many as convolutions use.
double spin_amx(Spin what, size_t rounds) {
  if (what != Spin::matrix) return kernels_avx512.spin(what, rounds);
  const TileConfig config(kDepth);
  memory_barrier();
  _tile_loadconfig(&config);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t r = 0; r < rounds; ++r) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * kRows * kRows * kDepth;
}

}  // namespace bitspike
