// Memory for kernels.
#pragma once
#include <cstddef>

namespace bitspike {

// 64-byte aligned memory that only grows, and forgets what it held when it does.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* get(size_t bytes);
  size_t size() const { return size_; }

 private:
  void free();
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitspike
