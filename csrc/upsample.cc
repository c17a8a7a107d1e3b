#include "upsample.h"

#include <algorithm>
#include <cstring>

#include "plan.h"

namespace bitspike {
namespace {

// The pixels before and behind the centre of pixel `i` of the enlarged side, and the weight of the second in 1 / (2 factor).
struct Between {
  int first, second, weight;
};

Between between(int i, int factor, int size) {
  const int centre = 2 * i + 1 - factor, unit = 2 * factor;
  const int first = centre < 0 ? -1 : centre / unit;  // centre > -unit
  return {std::max(first, 0), std::min(first + 1, size - 1), centre - first * unit};
}

}  // namespace

void upsample_nearest(const char* image, int width, size_t pixel_bytes, int factor, int row0, int row1, char* y) {
  const size_t from_row = width * pixel_bytes, to_row = factor * from_row;
  for (int row = row0; row < row1; ++row, y += to_row) {
    if (row > row0 && row % factor != 0) {
      memcpy(y, y - to_row, to_row);
      continue;
    }
    const char* from = image + row / factor * from_row;
    char* to = y;
    for (int x = 0; x < width; ++x, from += pixel_bytes)
      for (int i = 0; i < factor; ++i, to += pixel_bytes) memcpy(to, from, pixel_bytes);
  }
}

void upsample_bilinear(const int32_t* image, int height, int width, int channels, int factor, int row0, int row1,
                       int64_t* row, int32_t* y) {
  const size_t line = static_cast<size_t>(width) * channels;
  int shift = 0;
  while ((1 << shift) < 4 * factor * factor) ++shift;
  const int64_t half = int64_t{1} << (shift - 1);
  for (int r = row0; r < row1; ++r) {
    const Between v = between(r, factor, height);
    const int32_t *above = image + v.first * line, *below = image + v.second * line;
    const int64_t up = 2 * factor - v.weight, down = v.weight;
    for (size_t i = 0; i < line; ++i) row[i] = above[i] * up + below[i] * down;
    for (int x = 0; x < factor * width; ++x, y += channels) {
      const Between h = between(x, factor, width);
      const int64_t *left = row + static_cast<size_t>(h.first) * channels, *right = row + static_cast<size_t>(h.second) * channels;
      const int64_t a = 2 * factor - h.weight, b = h.weight;
      for (int c = 0; c < channels; ++c) y[c] = static_cast<int32_t>((left[c] * a + right[c] * b + half) >> shift);
    }
  }
}

void Plan::upsample(int x, bool bilinear, int factor, int y) {
  const auto run = [this, x, bilinear, factor, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value& v = values_[x];
    for (int t = 0; t < v.steps; ++t) {
      const char* from = image(v, g, tile.image, t);
      char* to = place(values_[y], g, tile, capacity, s, t);
      if (!bilinear) {
        upsample_nearest(from, v.width, v.position_bytes(), factor, tile.row0, tile.row1, to);
        continue;
      }
      int64_t* row = reinterpret_cast<int64_t*>(s.kernel.get(sizeof(int64_t) * v.width * v.channels));
      upsample_bilinear(reinterpret_cast<const int32_t*>(from), v.height, v.width, v.channels, factor, tile.row0, tile.row1,
                        row, reinterpret_cast<int32_t*>(to));
    }
  };
  add(run, {x, y});
}

}  // namespace bitspike
