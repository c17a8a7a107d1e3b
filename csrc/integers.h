// The arithmetic of docs/format.md for code that is compiled for every machine.
#pragma once
#include <cstdint>

namespace bitspike {

inline int64_t rshift(int64_t x, int s) { return s > 0 ? (x + (int64_t{1} << (s - 1))) >> s : x; }
inline int64_t clip(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }
inline int32_t sat32(int64_t x) { return static_cast<int32_t>(clip(x, INT32_MIN, INT32_MAX)); }

}  // namespace bitspike
