#include "memory.h"

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitspike {

constexpr size_t kLine = 64, kHugePage = 2 << 20;

Memory::~Memory() { free(); }

void Memory::free() {
#ifdef _WIN32
  _aligned_free(data_);
#else
  std::free(data_);
#endif
  data_ = nullptr, size_ = 0;
}

char* Memory::get(size_t bytes) {
  if (bytes <= size_) return data_;
  free();
  const size_t unit = bytes >= 2 * kHugePage ? kHugePage : kLine, size = (bytes + unit - 1) / unit * unit;
#ifdef _WIN32
  data_ = static_cast<char*>(_aligned_malloc(size, unit));
#else
  data_ = static_cast<char*>(std::aligned_alloc(unit, size));
#endif
  if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (unit == kHugePage) madvise(data_, size, MADV_HUGEPAGE);  // a wish: fewer pages to fault in and to look up
#endif
  size_ = size;
  return data_;
}

}  // namespace bitspike
