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
  int shift;
  const int8_t* weight;                  // [outputs, kernel_h, kernel_w, channels / groups]
  const int16_t* pad_value;              // [channels], each within the range of `kind`
  const int32_t* m;                      // [outputs]
  const int32_t* b;                      // [outputs]
  const void* packed;                    // what conv_pack wrote; nullptr where conv_packed_bytes is 0

  int group_channels() const { return channels / groups; }
  int group_outputs() const { return outputs / groups; }
  bool depthwise() const { return groups == channels && outputs == channels; }
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

struct Lif {
  int32_t decay_m, gain_m, threshold;
  int decay_s, gain_s;
  enum class Reset { hard, soft, none } reset;
  bool strict;
  int steps;
};

struct IeLif {
  int32_t decay_m;
  int decay_s, levels, fraction_bits, steps;
};

struct Kernels {
  const char* name;

  // Weights are laid out once per instruction set; `packed` needs no alignment beyond malloc's.
  size_t (*conv_packed_bytes)(const Conv&);
  void (*conv_pack)(const Conv&, void* packed);
  // Output rows [row0, row1) of one image. out: [row1 - row0, out_width, outputs].
  size_t (*conv_scratch_bytes)(const Conv&, int rows);
  void (*conv)(const Conv&, const void* image, int row0, int row1, int32_t* out, void* scratch);

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
  // y[c] = sat32(floor((2 m sum_n x[n, c] + n) / (2 n))); rows are row_stride elements apart; 2 |m| |sum| + n < 2^63.
  void (*mean)(Kind kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y);
  // Element i of step t is x[t * x_stride + i]; y[t * y_stride + i]. x_stride = 0 repeats one step.
  void (*lif)(const Lif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
  void (*ielif)(const IeLif&, const int32_t* x, size_t count, size_t x_stride, uint8_t* y, size_t y_stride);
  // table: [channels, 256]
  void (*lookup)(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y);
};

extern const Kernels kernels_scalar;

// The scalar kernels that other sets borrow. (Their tables must be constants: code that runs when the module is loaded
// must not use instructions the CPU may lack.)
void scalar_mean(Kind, const void* x, size_t rows, size_t columns, size_t row_stride, int32_t m, int32_t* y);
void scalar_lookup(const uint8_t* x, size_t rows, size_t channels, const int8_t* table, int8_t* y);

#ifdef BITSPIKE_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// dispatch.cc: the sets this CPU can run, best last; nullptr ends the list.
const Kernels* const* available_kernels();
const Kernels* find_kernels(const char* name);  // nullptr if this CPU or build lacks it

}  // namespace bitspike
