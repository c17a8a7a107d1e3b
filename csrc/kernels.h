// Every operation on codes, declared once: types, layout, limits. docs/format.md has the definitions.
//
// A set of kernels (`Kernels`) exists per instruction set. All of them compute the same integers: scalar.cc is the
// compiled definition, the others are checked against it and against numpy on every shape that was ever trouble.
//
// Layout: channels last, contiguous. An image is [H, W, C]; time steps and batch are both just "images" to a kernel.
// Rounding shift: rshift(x, s) = (x + (1 << (s - 1))) >> s for s > 0, x for s = 0, on int64; 0 <= s <= 62.
// Limits a caller must guarantee (the artifact reader proves them; kernels do not check): |acc| < 2^31 for convolution
// and attention, |m| < 2^31.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitspike {

enum class Kind { u8, s8, i32 };

inline size_t bytes_of(Kind kind) { return kind == Kind::i32 ? 4 : 1; }

// y[o] = sat32(rshift(acc[o] * m[o], s) + b[o]), acc = sum over taps and channels of weight * code.
struct Conv {
  int height, width, channels;           // of the input
  int out_height, out_width, outputs;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, groups;
  Kind kind;                             // u8 or s8 input codes
  int lo, hi;                            // every input code and pad_value lies in lo..hi; 0..255 or -128..127 always holds
  int shift;
  const int8_t* weight;                  // [outputs, kernel_h, kernel_w, channels / groups]; only `pack` reads it
  const int16_t* pad_value;              // [channels]
  const int32_t* m;                      // [outputs]
  const int32_t* b;                      // [outputs]
  // What describe_weights found; the variants decide by it.
  int weight_lo, weight_hi;              // smallest and largest weight
  bool weight_pow2, weight_bipolar;      // every weight is 0 or +-2^e; every weight is -1 or +1
  int64_t largest;                       // what no potential is further from 0 than, before saturation
  bool wide_tiles;                       // winograd, if supported, can make 2x4 outputs at a time (winograd.h)
  bool by_bits;                          // events: codes may be added bit by bit (events.h); may change from call to call
  const char *ahead = nullptr, *ahead_end = nullptr;  // weights that some convolution after this one will read: matrix fetches them

  int group_channels() const { return channels / groups; }
  int group_outputs() const { return outputs / groups; }
  int most_code() const { return hi > -lo ? hi : -lo; }
  int most_weight() const { return weight_hi > -weight_lo ? weight_hi : -weight_lo; }
  bool depthwise() const { return groups == channels && outputs == channels; }
  int bit_planes() const {  // of the input's codes, which are u8
    int planes = 1;
    while (hi >> planes) ++planes;
    return planes;
  }
};

// Fills weight_lo .. wide_tiles from `weight`, m, b, shift and the range of the codes. Call it once, before anything else sees the Conv.
void describe_weights(Conv&);

// y = clip(rshift(x * m[c], s), lo, hi): a neuron without memory, or the codes of an inner activation. u8 and s8 differ
// in lo..hi only. m has one number per channel, or one (per_channel = false).
struct Quantizer {
  const int32_t* m;
  bool per_channel;
  int shift;
  int32_t lo, hi;
};

// The same codes from the sums themselves, where no potential is wanted (direct.cc): a code is
// clip((clip(acc, first, last) * m + b) >> shift, lo, hi), modulo 2^32, or clip(round(acc * scale + bias), lo, hi), fused and to the nearest
// even, with numbers per output, in arrays that may be read 64 numbers beyond the last. Or else, where the two roundings on the way can't be
// one, from the potentials: clip(round(x * code_scale + code_bias), lo, hi), where x = (acc * scale + kWhole) - bias if there is a scale, too:
// floats as large have no fraction. Pointers are null where there are no such numbers.
struct Direct {
  static constexpr float kWhole = 3 << 22;
  int shift, lo, hi;
  const int32_t *first, *last, *m, *b;
  const float *scale, *bias;
  const float *code_scale, *code_bias;
};

// What becomes of a row of potentials x while it is still in registers:
//   y = residual ? sat32(x + residual) : x;  out = y;  codes[i] = quantizer[i](y);  nonzero[i] += how many are not 0
// Every pointer may be null (a null codes[i] skips that quantizer) and points at the first row that is written; rows are
// contiguous: [rows, width, channels]. `out` may be `residual`; otherwise nothing overlaps. One thread, one nonzero.
struct Epilogue {
  const int32_t* residual;
  int32_t* out;
  Quantizer quantizer[2];
  uint8_t* codes[2];
  size_t* nonzero[2];
  const Direct* direct;  // what a convolution may do instead: codes[0] is all there is to write. Or nullptr
  int16_t* sums;         // what a convolution does instead of everything else: it writes its sums, which fit. Or nullptr
  bool fits;             // x + residual cannot leave 32 bits
};

// The ways to compute one convolution. All that support it give the same integers.
enum class Variant {
  dense,     // every product: any convolution
  narrow,    // as dense, with weights of 2 or 4 bits that stay packed in memory and are unpacked in registers
  events,    // additions of weight rows, only for codes that are not 0: sparse u8 codes
  sliced,    // the same for weights -1 and +1, whose rows of bits are added by carry-save adders
  popcount,  // AND and bit counts on planes of the codes: weights -1 and +1, u8 codes
  shift,     // weights 0 and +-2^e: shifts and additions, no products
  winograd,  // 16 products for four outputs that have 36: 3x3, stride 1, weights and u8 codes of few bits
  matrix,    // as dense, by a matrix unit: one group of channels
};
constexpr int kVariants = 8;
const char* variant_name(Variant);  // "dense" ...

struct ConvKernel {
  bool (*supported)(const Conv&);        // by everything but the image's size; the others may be called only if true
  // Weights are laid out once per instruction set and variant, whatever the size of the image; `packed` is aligned to 64
  // bytes. m, b and the weights are copied into it; pad_value is not.
  size_t (*packed_bytes)(const Conv&);
  void (*pack)(const Conv&, void* packed);
  // Output rows [row0, row1) of one image; `image` is its first row.
  size_t (*scratch_bytes)(const Conv&, int rows);  // `scratch` is aligned to 64 bytes
  void (*run)(const Conv&, const void* packed, const void* image, int row0, int row1, const Epilogue&, void* scratch);
};

// Window maximum over the pixels that exist; padding < kernel, so every window holds one.
struct Pool {
  int height, width, channels, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  Kind kind;
};

// q (k^T v) for one head of one image; q, k, v, y point at the head's first channel of the first token.
struct Attention {
  int tokens, channels, head_channels;   // `channels` is the distance between tokens
  int32_t m;
  int shift;
};

// One image and time step of attention by maps of spikes or counts; arrays are [tokens, heads * width], a map is [rows, heads,
// side]. Largest sums: see docs/format.md; all are below 2^31.
struct Heads {
  size_t tokens, heads, width;
};

struct MapKernel {
  // y: rows [row0, row1) of a map. over_channels: side and rows are tokens, a = q, b = k; else channels of a head, a = v.
  size_t (*map_scratch_bytes)(const Heads&, bool over_channels, size_t rows);
  void (*map)(const Heads&, bool over_channels, const uint8_t* a, const uint8_t* b, size_t row0, size_t row1, int32_t m,
              int shift, int32_t* y, void* scratch);
  // y: tokens [first, first + count), [count, heads * width]. m: one number per head.
  size_t (*read_scratch_bytes)(const Heads&, bool over_tokens, size_t count);
  void (*read)(const Heads&, bool over_tokens, const uint8_t* chosen, const uint8_t* x, size_t first, size_t count,
               const int32_t* m, int shift, int32_t* y, void* scratch);
};

struct Lif {
  int32_t decay_m, gain_m, threshold;
  int decay_s, gain_s;
  enum class Reset { hard, soft, none } reset;
  bool strict;
  int steps;
};

// A table of potentials for searching: the line from `first` to `last` cut into buckets of 2^shift potentials, none of which
// holds two entries. A word: how many entries lie before the bucket, above kOffsetBits; below, how far into the bucket its
// own entry lies, or kNone.
struct Buckets {
  static constexpr int kOffsetBits = 24, kMost = 4096;
  static constexpr int32_t kNone = (1 << kOffsetBits) - 1;
  const uint32_t* words;
  int32_t first, last;
  int shift;
};

// How many words the buckets of a sorted table have; 0 if it has none: too long a line for its narrowest gap. What it gives
// for `words` of nullptr; else it fills them and `buckets`.
size_t make_buckets(const int32_t* table, int entries, uint32_t* words, Buckets* buckets);

// lif with a soft reset by `amount`; with a table ([entries], sorted) the potential is a code between steps: the number of
// entries that are not above it, less entries / 2.
struct PackedLif {
  Lif lif;
  int32_t amount;
  const int32_t* table;  // nullptr: the potential itself is kept
  int entries;
  const Buckets* buckets;  // of the table, or nullptr
};

// Potentials that are codes times a number: sat32(rshift(code * m, s) + b), codes up to `hi`.
struct Scaled {
  int32_t m, b;
  int shift, hi;
};

// A neuron that reads sums of a convolution in place of its potentials: rational numbers decide, except where they are too near
// the threshold to tell. Numbers that `LifOfSums` (lif_of_sums.cc) has proved; lif_sums.h has the kernel.
struct SumsLif {
  static constexpr int kMostSteps = 16, kPieces = 32;
  PackedLif exact;            // of the potentials that m, b and shift make of sums
  const int32_t *m, *b;       // [outputs]; nullptr: there are no sums
  int shift;
  const float *scale, *bias;  // [outputs], and 64 more: the drive is about sum * scale + bias
  float residual, furthest;   // and about so much times the residual; how far that may be from 0, if it is potentials
  Scaled scaled;              // of a residual of codes
  float decay, amount;
  float below, above;         // less than `below` does surely not fire, more than `above` surely does
  float below_first, above_first;  // the same at the first step, when nothing is stored yet
  const float* pieces;        // [kPieces] values at 0, then slopes: what is left of a stored potential where there is a table
  float first, last;          // the line that is cut into pieces; potential v lies in piece v * per + offset
  float per, offset;
};

// What it reads, [steps, pixels, channels] each, and from step to step: sums, and a residual, or codes that are one, or neither; or
// potentials alone, as a residual of no sums.
struct Drives {
  const int16_t* sums;
  size_t sums_step;
  const int32_t* residual;
  const uint8_t* codes;
  size_t residual_step;
};

struct IeLif {
  int32_t decay_m;
  int decay_s, levels, fraction_bits, steps;
};

// The instructions that bound a variant: products (dense, narrow), AND and count (popcount), 8-bit additions (events), full
// adders (sliced), products of tiles (matrix).
enum class Spin { dot, popcount, add, carry, matrix };

struct Kernels {
  const char* name;

  ConvKernel conv[kVariants];            // by Variant; conv[0] (dense) supports everything

  // The epilogue alone, for potentials that no convolution made: x is [rows, channels], what it writes too.
  void (*finish)(const int32_t* x, size_t rows, size_t channels, const Epilogue&);
  // x: [rows, channels]; m has one number per channel. A single m: pass channels = 1 ... or rows = 1 with a longer row
  // and per_channel = false, which is the fast way. y is u8 or s8 by is_signed; lo and hi fit it.
  void (*quantize)(const int32_t* x, size_t rows, size_t channels, const int32_t* m, bool per_channel, int shift,
                   int32_t lo, int32_t hi, bool is_signed, void* y);
  // As quantize; per_channel goes for both m and b.
  void (*affine)(Kind kind, const void* x, size_t rows, size_t channels, const int32_t* m, const int32_t* b,
                 bool per_channel, int shift, int32_t* y);
  void (*add)(const int32_t* a, const int32_t* b, size_t count, int32_t* y);
  // Output rows [row0, row1) of one image.
  void (*maxpool)(const Pool&, const void* image, int row0, int row1, void* out);
  size_t (*attention_scratch_bytes)(const Attention&);
  void (*attention)(const Attention&, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch);
  MapKernel maps;
  // y[c] = sat32(floor((2 m sum_n x[n, c] + n) / (2 n))); rows are row_stride elements apart; 2 |m| |sum| + n < 2^63.
  void (*mean)(Kind kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y);
  // Element i of step t is x[t * x_stride + i]; y[t * y_stride + i]. x_stride = 0 repeats one step.
  void (*lif)(const Lif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
  void (*lif_packed)(const PackedLif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
  void (*lif_sums)(const SumsLif&, const Drives&, size_t pixels, size_t channels, uint8_t* y, size_t y_stride);  // or nullptr
  void (*ielif)(const IeLif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
  // table: [channels, 256]
  void (*lookup)(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y);
  bool direct;  // whether convolutions make use of Epilogue::direct
  int event_bytes;    // events: of a vector of a row's weights
  bool carry_save;    // whether those of 4 bits (rows_of_nibbles) go through carry-save adders, where codes may be added bit by bit
  // Runs bare instructions in registers for `rounds`; returns the multiply-accumulates they did (an addition counts as
  // one). 0 where there is no such instruction. Null: not measured.
  double (*spin)(Spin, size_t rounds);
};

extern const Kernels kernels_scalar;

// Lists of events hold row numbers times this, a factor that the addressing of rows has for nothing.
constexpr int kEventEntry = 8;
constexpr int kListedRows = 8191;  // of weights: times kEventEntry, their numbers must fit into 16 bits

// The rule for `supported` that every set starts from (scalar.cc); a set may support less, never more.
bool may_support(Variant, const Conv&);

// Events: whether rows of weights, `bytes` outputs to a vector, are kept as 4 bits an output (see events.h).
inline bool rows_of_nibbles(const Conv& c, int bytes) {
  return c.weight_lo >= -8 && c.weight_hi <= 7 && c.outputs > bytes &&
         static_cast<size_t>(c.kernel_h) * c.kernel_w * c.channels <= kListedRows;
}

// Events: how many neighbouring output pixels have one list, their rows of weights side by side, because one's row would leave most
// of a vector of `bytes` empty (see events.h). A power of two. Without carry-save adders, rows of 4 bits are no gain.
inline int events_across(const Conv& c, int bytes, bool carry_save) {
  if (bytes == 0 || c.groups > 1) return 1;
  const int all = carry_save && c.weight_lo >= -8 && c.weight_hi <= 7 ? 2 * bytes : bytes;
  if (c.kernel_w <= c.stride_w || c.outputs < 16 || (c.outputs & (c.outputs - 1))) return 1;
  int across = all > c.outputs ? all / c.outputs : 1;
  while (across > 1 && static_cast<size_t>(c.kernel_h) * (c.kernel_w + (across - 1) * c.stride_w) * c.channels > kListedRows) across /= 2;
  return across;
}

// The convolution that this is: a window for so many pixels, whose outputs it makes. Its weights are still those of c.
inline Conv events_conv(const Conv& c, int bytes, bool carry_save) {
  Conv wide = c;
  const int across = events_across(c, bytes, carry_save);
  wide.kernel_w += (across - 1) * c.stride_w;
  wide.stride_w *= across;
  wide.outputs *= across;
  wide.out_width = (c.out_width + across - 1) / across;
  return wide;
}

// Sliced: whether the taps of a row lie side by side in a row of bits of `outputs` bits (see sliced.h).
inline bool sliced_across(const Conv& c, int outputs) {
  return c.stride_w == 1 && c.kernel_w >= 2 && c.kernel_w <= 4 && c.outputs <= outputs / 2;
}

// The scalar kernels that other sets borrow. (Their tables must be constants: code that runs when the module is loaded
// must not use instructions the CPU may lack.)
void scalar_mean(Kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y);
void scalar_lif_packed(const PackedLif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
void scalar_lookup(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y);

#ifdef BITSPIKE_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// avx512_popcount.cc: not supported on a CPU without vpopcntd.
bool popcount_supported_avx512(const Conv&);
size_t popcount_packed_bytes_avx512(const Conv&);
void popcount_pack_avx512(const Conv&, void* packed);
size_t popcount_scratch_bytes_avx512(const Conv&, int rows);
void conv_popcount_avx512(const Conv&, const void* packed, const void* image, int row0, int row1, const Epilogue&,
                          void* scratch);
extern const MapKernel maps_popcount_avx512;
double spin_popcount_avx512(size_t rounds);
bool cpu_has_avx512_popcount();  // dispatch.cc

// avx512_sliced.cc, for CPUs with VBMI and GFNI: lays nothing out otherwise than the kernel of all AVX-512.
void conv_sliced_avx512(const Conv&, const void* packed, const void* image, int row0, int row1, const Epilogue&, void* scratch);
constexpr size_t kMostTables = 4;  // that lookup_avx512 takes
void lookup_avx512(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y);
bool cpu_has_avx512_matrices();  // dispatch.cc

// avx512_compress.cc, for CPUs with VBMI2: see append_events in avx512.h.
size_t append_events_avx512(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base);
size_t append_plane_avx512(uint16_t* to, size_t count, const uint8_t* codes, int channels, uint16_t base, int plane);
bool cpu_has_avx512_compress();  // dispatch.cc

// amx.cc: the set "amx" is that of AVX-512, all of the above included, with these. Where the compiler knows AMX.
extern const ConvKernel matrix_amx;
double spin_amx(Spin, size_t rounds);
// amx_attention.cc
size_t attention_scratch_bytes_amx(const Attention&);
void attention_amx(const Attention&, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch);
#endif

#ifdef BITSPIKE_ARM64
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dot;
#endif

// dispatch.cc: the sets this CPU can run, best last; nullptr ends the list.
const Kernels* const* available_kernels();
const Kernels* find_kernels(const char* name);  // nullptr if this CPU or build lacks it

}  // namespace bitspike
