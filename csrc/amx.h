// What the files for the matrix unit share: the size of a tile, and how its registers are set up (see amx.cc).
#pragma once
#include "avx512.h"

namespace bitspike {
namespace {

constexpr int kRows = 16, kDepth = 64, kTile = 1024;  // of a tile: rows, codes or bytes of a row, bytes

// The compiler does not know that the instructions for tiles read and write memory.
BITSPIKE_INLINE void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 .. 3 are sums, 4 and 5 rows of `depth` codes, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  explicit TileConfig(size_t depth) {
    for (int i = 0; i < 8; ++i) row_bytes[i] = kDepth, rows[i] = kRows;
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(depth);
    rows[6] = rows[7] = static_cast<uint8_t>(depth / 4);
  }
};

}  // namespace
}  // namespace bitspike
