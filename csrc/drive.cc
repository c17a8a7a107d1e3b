#include "drive.h"

#include <algorithm>

#include "memory.h"
#include "pool.h"

namespace bitspike {
namespace {

constexpr size_t kPiece = 1 << 14;  // elements of a cheap operation worth handing to another thread

// Kept between calls: fresh pages for every convolution would cost more than a small one.
void* scratch(size_t bytes) {
  thread_local Memory memory;
  return memory.get(bytes);
}

// Calls piece(first, count) on pieces of [0, total) of at least `least` elements.
template <class Piece>
void split(size_t total, size_t least, int threads, Piece piece) {
  if (total == 0) return;
  const size_t most = threads < 1 ? 1 : static_cast<size_t>(threads) * 2;
  const size_t pieces = std::clamp<size_t>(total / std::max<size_t>(least, 1), 1, most);
  parallel_for(pieces, threads, [&](size_t i) {
    const size_t first = total * i / pieces;
    piece(first, total * (i + 1) / pieces - first);
  });
}

const char* at(Kind kind, const void* x, size_t i) { return static_cast<const char*>(x) + i * bytes_of(kind); }
char* at(Kind kind, void* y, size_t i) { return static_cast<char*>(y) + i * bytes_of(kind); }

// A task is some rows of one image: all of them when there are images enough for every thread.
template <class Rows>
void split_rows(size_t images, int height, int threads, Rows rows) {
  if (images == 0) return;
  const size_t wanted = threads <= 1 || images >= 2 * static_cast<size_t>(threads) ? 1 : (2 * threads + images - 1) / images;
  const size_t parts = std::min<size_t>(wanted, height);
  parallel_for(images * parts, threads, [&](size_t i) {
    const size_t image = i / parts, part = i % parts;
    rows(image, static_cast<int>(height * part / parts), static_cast<int>(height * (part + 1) / parts));
  });
}

}  // namespace

void conv_images(const Kernels& k, const Conv& c, const void* packed, const void* x, size_t images, int32_t* y, int threads) {
  const size_t in = static_cast<size_t>(c.height) * c.width * c.channels;
  const size_t row = static_cast<size_t>(c.out_width) * c.outputs;
  split_rows(images, c.out_height, threads, [&](size_t image, int row0, int row1) {
    const ConvKernel& conv = k.conv[static_cast<int>(Variant::dense)];
    Epilogue e{};
    e.out = y + (image * c.out_height + row0) * row;
    conv.run(c, packed, at(c.kind, x, image * in), row0, row1, e, scratch(conv.scratch_bytes(c, row1 - row0)));
  });
}

void quantize_pixels(const Kernels& k, const int32_t* x, size_t pixels, size_t channels, const int32_t* m,
                     bool per_channel, int shift, int32_t lo, int32_t hi, bool is_signed, void* y, int threads) {
  const size_t row = per_channel ? channels : 1;
  split(pixels * channels / row, kPiece / row, threads, [&](size_t first, size_t count) {
    char* to = static_cast<char*>(y) + first * row;
    if (per_channel) k.quantize(x + first * row, count, row, m, true, shift, lo, hi, is_signed, to);
    else k.quantize(x + first, 1, count, m, false, shift, lo, hi, is_signed, to);
  });
}

void affine_pixels(const Kernels& k, Kind kind, const void* x, size_t pixels, size_t channels, const int32_t* m,
                   const int32_t* b, bool per_channel, int shift, int32_t* y, int threads) {
  const size_t row = per_channel ? channels : 1;
  split(pixels * channels / row, kPiece / row, threads, [&](size_t first, size_t count) {
    const void* from = at(kind, x, first * row);
    if (per_channel) k.affine(kind, from, count, row, m, b, true, shift, y + first * row);
    else k.affine(kind, from, 1, count, m, b, false, shift, y + first);
  });
}

void add_values(const Kernels& k, const int32_t* a, const int32_t* b, size_t count, int32_t* y, int threads) {
  split(count, kPiece, threads, [&](size_t first, size_t n) { k.add(a + first, b + first, n, y + first); });
}

void maxpool_images(const Kernels& k, const Pool& p, const void* x, size_t images, void* y, int threads) {
  const size_t in = static_cast<size_t>(p.height) * p.width * p.channels;
  const size_t row = static_cast<size_t>(p.out_width) * p.channels;
  split_rows(images, p.out_height, threads, [&](size_t image, int row0, int row1) {
    k.maxpool(p, at(p.kind, x, image * in), row0, row1, at(p.kind, y, (image * p.out_height + row0) * row));
  });
}

void attention_images(const Kernels& k, const Attention& a, int heads, const uint8_t* q, const uint8_t* key,
                      const uint8_t* v, size_t images, int32_t* y, int threads) {
  const size_t image_size = static_cast<size_t>(a.tokens) * a.channels;
  parallel_for(images * heads, threads, [&](size_t i) {
    const size_t first = i / heads * image_size + i % heads * a.head_channels;
    k.attention(a, q + first, key + first, v + first, y + first, scratch(k.attention_scratch_bytes(a)));
  });
}

void mean_space(const Kernels& k, Kind kind, const void* x, size_t images, size_t pixels, size_t channels, int32_t m,
                int32_t* y, int threads) {
  split(images, kPiece / std::max<size_t>(pixels * channels, 1), threads, [&](size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i)
      k.mean(kind, at(kind, x, i * pixels * channels), pixels, channels, channels, m, y + i * channels);
  });
}

void mean_time(const Kernels& k, Kind kind, const void* x, size_t steps, size_t count, int32_t m, int32_t* y,
               int threads) {
  split(count, kPiece, threads,
        [&](size_t first, size_t n) { k.mean(kind, at(kind, x, first), steps, n, count, m, y + first); });
}

void lif_steps(const Kernels& k, const Lif& p, const int32_t* x, size_t x_steps, size_t count, uint8_t* y,
               int threads) {
  split(count, kPiece, threads, [&](size_t first, size_t n) {
    k.lif(p, x + first, n, x_steps == 1 ? 0 : count, y + first, count);
  });
}

void ielif_steps(const Kernels& k, const IeLif& p, const int32_t* x, size_t x_steps, size_t count, uint8_t* y,
                 int threads) {
  split(count, kPiece, threads, [&](size_t first, size_t n) {
    k.ielif(p, x + first, n, x_steps == 1 ? 0 : count, y + first, count);
  });
}

void lookup_pixels(const Kernels& k, const uint8_t* x, size_t pixels, size_t channels, const int8_t* table, int8_t* y,
                   int threads) {
  split(pixels, kPiece / std::max<size_t>(channels, 1), threads, [&](size_t first, size_t count) {
    k.lookup(x + first * channels, count, channels, table, y + first * channels);
  });
}

}  // namespace bitspike
