// Random operations through every set of kernels this CPU can run, against the scalar one, for a number of seconds.
//
//   compare_kernels SECONDS [SEED]
//
// Stands alone (no Python), so that it can be cross-compiled and run in an emulator, or built with sanitizers. Under AddressSanitizer every
// buffer is a heap block of exactly the size it needs; elsewhere packed weights, scratch and pictures end at a page that nobody may touch,
// which stops instructions too that a sanitizer does not see, as loads of tiles.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "../../csrc/direct.h"
#include "../../csrc/integers.h"
#include "../../csrc/kernels.h"
#include "../../csrc/lif_of_sums.h"

namespace {

using namespace bitspike;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(next() % static_cast<uint64_t>(hi - lo + 1)); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  template <size_t N>
  int pick(const int (&list)[N]) {
    return list[next() % N];
  }

 private:
  uint64_t state_;
};

// `size` bytes, aligned as kernels.h says. What lies behind them, rounded up to the alignment, may not be touched.
class Block {
 public:
  explicit Block(size_t size, size_t alignment = 64) {
    const size_t rounded = (std::max<size_t>(size, 1) + alignment - 1) / alignment * alignment;
#ifdef __SANITIZE_ADDRESS__
    all_ = 0;
    if (posix_memalign(&data_, std::max(alignment, sizeof(void*)), std::max<size_t>(size, 1))) abort();
    base_ = static_cast<char*>(data_);
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    all_ = (rounded + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + all_ - page, page, PROT_NONE)) abort();
    data_ = base_ + all_ - page - rounded;
#endif
    memset(data_, 0xab, size);
  }
  ~Block() {
    if (all_) munmap(base_, all_);
    else free(data_);
  }
  Block(const Block&) = delete;
  void* data() { return data_; }

 private:
  char* base_;
  size_t all_;
  void* data_;
};

// What is being computed, for whoever touches a page that it must not.
char g_now[600] = "";
void on_fault(int) {
  printf("OUT OF BOUNDS: %s\n", g_now);
  fflush(stdout);
  _exit(1);
}

template <class T>
T* exact(std::vector<T>& v) {
  v.shrink_to_fit();
  return v.data();
}

int32_t some_int32(Random& r) {
  switch (r.between(0, 5)) {
    case 0: return 0;
    case 1: return INT32_MAX;
    case 2: return INT32_MIN;
    case 3: return static_cast<int32_t>(r.between(-5, 5));
    case 4: return static_cast<int32_t>(r.between(-100000, 100000));
    default: return static_cast<int32_t>(r.next());
  }
}

int32_t some_m(Random& r) {
  const int32_t m = some_int32(r);
  return m == INT32_MIN ? -INT32_MAX : m;
}

// One style for all numbers of a list, as in real networks, or anything.
std::vector<int32_t> numbers(Random& r, size_t count, bool is_m) {
  std::vector<int32_t> list(count);
  const int style = static_cast<int>(r.between(0, 2));
  const int64_t size = style == 0 ? 300 : style == 1 ? 1 << 20 : 0;
  for (int32_t& v : list)
    v = size ? static_cast<int32_t>(r.between(is_m && r.chance(50) ? 0 : -size, size)) : is_m ? some_m(r) : some_int32(r);
  return list;
}

int some_shift(Random& r) { return static_cast<int>(r.chance(70) ? r.between(0, 30) : r.between(0, 62)); }

// ------------------------------------------------------------------------------------------------ convolution
struct Epilogues {
  bool residual, out, in_place, codes[2], nonzero[2];
  Quantizer quantizer[2];
  std::vector<int32_t> m[2];
};

Quantizer some_quantizer(Random& r, std::vector<int32_t>& m, int channels) {
  Quantizer q{};
  q.per_channel = r.chance(40);
  m = numbers(r, q.per_channel ? channels : 1, true);
  if (r.chance(50))
    for (int32_t& v : m) v = static_cast<int32_t>(r.between(1, 8));
  q.m = m.data();
  q.shift = some_shift(r);
  if (r.chance(70)) q.lo = 0, q.hi = r.pick({1, 2, 4, 8, 15, 127, 255});
  else q.lo = -static_cast<int>(r.between(0, 127)), q.hi = static_cast<int>(r.between(0, 127));
  return q;
}

struct Written {
  std::vector<int32_t> out;
  std::vector<uint8_t> codes[2];
  size_t nonzero[2] = {};
  bool operator==(const Written& o) const {
    return out == o.out && codes[0] == o.codes[0] && codes[1] == o.codes[1] && nonzero[0] == o.nonzero[0] &&
           nonzero[1] == o.nonzero[1];
  }
};

template <class Run>
Written write(const Epilogues& e, const std::vector<int32_t>& residual, size_t count, Run run) {
  Written w;
  std::vector<int32_t> own = residual;
  if (e.out && !e.in_place) w.out.assign(count, 0x5a5a5a5a);
  Epilogue epilogue{};
  if (e.residual) epilogue.residual = exact(own);
  if (e.out) epilogue.out = e.in_place ? own.data() : exact(w.out);
  for (int k = 0; k < 2; ++k) {
    epilogue.quantizer[k] = e.quantizer[k];
    if (!e.codes[k]) continue;
    w.codes[k].assign(count, 0x5a);
    epilogue.codes[k] = exact(w.codes[k]);
    if (e.nonzero[k]) epilogue.nonzero[k] = &w.nonzero[k];
  }
  run(epilogue);
  if (e.in_place) w.out = own;
  return w;
}

Epilogues some_epilogue(Random& r, int channels) {
  Epilogues e{};
  e.residual = r.chance(40);
  e.codes[0] = r.chance(70);
  e.codes[1] = e.codes[0] && r.chance(20);
  e.out = !e.codes[0] || r.chance(50);
  e.in_place = e.out && e.residual && r.chance(30);
  for (int k = 0; k < 2; ++k) {
    e.nonzero[k] = r.chance(60);
    e.quantizer[k] = some_quantizer(r, e.m[k], channels);
  }
  return e;
}

std::string text(const Conv& c) {
  char line[400];
  snprintf(line, sizeof line, "conv %dx%dx%d -> %dx%dx%d kernel %dx%d stride %dx%d pad %dx%d groups %d %s codes %d..%d shift %d",
           c.height, c.width, c.channels, c.out_height, c.out_width, c.outputs, c.kernel_h, c.kernel_w, c.stride_h, c.stride_w,
           c.pad_h, c.pad_w, c.groups, c.kind == Kind::s8 ? "s8" : "u8", c.lo, c.hi, c.shift);
  return line;
}

bool check_conv(Random& r) {
  Conv c{};
  c.kernel_h = r.pick({1, 1, 2, 3, 3, 5, 7}), c.kernel_w = r.chance(80) ? c.kernel_h : r.pick({1, 2, 3, 4});
  c.stride_h = r.pick({1, 1, 2, 3}), c.stride_w = r.chance(80) ? c.stride_h : r.pick({1, 2});
  const bool depthwise = r.chance(25);
  if (depthwise && r.chance(60)) c.kernel_h = static_cast<int>(r.between(1, 9)), c.kernel_w = r.pick({3, 5, 7}), c.stride_h = c.stride_w = 1;
  c.pad_h = static_cast<int>(r.between(0, c.kernel_h)), c.pad_w = static_cast<int>(r.between(0, c.kernel_w));
  const auto side = [&](int kernel, int pad) { return static_cast<int>(r.between(kernel > 2 * pad ? kernel - 2 * pad : 1, 14)); };
  c.height = side(c.kernel_h, c.pad_h), c.width = r.chance(5) ? 70 : r.chance(10) ? static_cast<int>(r.between(15, 40)) : side(c.kernel_w, c.pad_w);
  c.channels = r.pick({1, 2, 3, 4, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 100});
  if (!depthwise && r.chance(10)) {  // as wide as layers of transformers
    c.channels = r.pick({128, 256, 360, 512, 1440});
    c.kernel_h = std::min(c.kernel_h, 3), c.kernel_w = std::min(c.kernel_w, 3);
  }
  if (depthwise && r.chance(40)) c.channels = r.pick({40, 63, 64, 129, 360});
  switch (depthwise ? 0 : r.between(1, 3)) {
    case 0: c.groups = c.channels, c.outputs = c.channels; break;
    case 1:
      do c.groups = static_cast<int>(r.between(1, c.channels));
      while (c.channels % c.groups);
      c.outputs = c.groups * r.pick({1, 2, 3, 17});
      break;
    default: c.groups = 1, c.outputs = r.pick({1, 3, 4, 10, 15, 16, 17, 32, 48, 63, 64, 65, 100, 130});
  }
  c.out_height = (c.height + 2 * c.pad_h - c.kernel_h) / c.stride_h + 1;
  c.out_width = (c.width + 2 * c.pad_w - c.kernel_w) / c.stride_w + 1;
  c.kind = r.chance(30) ? Kind::s8 : Kind::u8;
  c.hi = c.kind == Kind::s8 ? r.pick({1, 7, 127}) : r.pick({1, 1, 2, 4, 8, 15, 127, 255});
  c.lo = c.kind == Kind::s8 ? -c.hi - (c.hi == 127 && r.chance(20)) : 0;
  c.by_bits = r.chance(50);
  c.shift = some_shift(r);
  const size_t taps = static_cast<size_t>(c.kernel_h) * c.kernel_w * c.group_channels();
  std::vector<int8_t> weight(c.outputs * taps);
  const int style = static_cast<int>(r.between(0, 4)), bits = static_cast<int>(r.between(2, 8)), fixed = r.chance(50) ? -128 : 127;
  for (int8_t& w : weight) {
    const int power = static_cast<int>(r.between(-1, 6));
    if (style == 0) w = r.chance(50) ? 1 : -1;
    else if (style == 1) w = static_cast<int8_t>(power < 0 ? 0 : (r.chance(50) ? 1 : -1) * (1 << power));
    else if (style == 2) w = static_cast<int8_t>(fixed);
    else w = static_cast<int8_t>(r.between(-(1 << (bits - 1)), (1 << (bits - 1)) - 1));
  }
  std::vector<int16_t> pad(c.channels, 0);
  if (r.chance(40))
    for (int16_t& p : pad) p = static_cast<int16_t>(r.between(c.lo, c.hi));
  const std::vector<int32_t> m = numbers(r, c.outputs, true), b = numbers(r, c.outputs, false);
  std::vector<uint8_t> image(static_cast<size_t>(c.height) * c.width * c.channels, 0);
  const int density = r.pick({-1, 0, 3, 15, 50, 100, 101});
  for (uint8_t& x : image)
    if (density == 101) x = static_cast<uint8_t>(r.chance(50) ? c.lo : c.hi);
    else if (r.chance(density)) x = static_cast<uint8_t>(r.between(c.lo, c.hi));
  if (density == -1) image[r.next() % image.size()] = static_cast<uint8_t>(c.hi);  // one spike
  c.weight = exact(weight), c.pad_value = exact(pad), c.m = m.data(), c.b = b.data();
  describe_weights(c);

  // Its end is that of the memory there is, or its beginning is aligned.
  Block picture(image.size(), image.size() % 64 == 0 || r.chance(50) ? 64 : 1);
  memcpy(picture.data(), image.data(), image.size());

  const Epilogues e = some_epilogue(r, c.outputs);
  const int row0 = r.chance(30) ? static_cast<int>(r.between(0, c.out_height - 1)) : 0;
  const int row1 = r.chance(30) ? static_cast<int>(r.between(row0 + 1, c.out_height)) : c.out_height;
  const size_t count = static_cast<size_t>(row1 - row0) * c.out_width * c.outputs;
  std::vector<int32_t> residual(count);
  const bool small = r.chance(50);
  int64_t furthest = 0;
  for (int32_t& v : residual) v = small ? static_cast<int32_t>(r.between(-100000, 100000)) : some_int32(r), furthest = std::max(furthest, std::abs(int64_t{v}));
  const bool fits = c.largest + furthest <= INT32_MAX;
  // What convolutions may do in place of the epilogue; the scalar ones never do.
  const bool only_codes = e.codes[0] && !e.codes[1] && !e.residual && !e.out;
  const DirectCodes direct = only_codes ? DirectCodes(c, e.quantizer[0]) : DirectCodes();
  const auto run = [&](const ConvKernel& kernel) {
    Block packed(kernel.packed_bytes(c)), scratch(kernel.scratch_bytes(c, row1 - row0));
    kernel.pack(c, packed.data());
    Conv unpacked = c;  // the weights, m and b are no longer needed
    unpacked.weight = nullptr, unpacked.m = nullptr, unpacked.b = nullptr;
    return write(e, residual, count, [&](Epilogue epilogue) {
      epilogue.direct = direct.get();
      epilogue.fits = fits;
      kernel.run(unpacked, packed.data(), picture.data(), row0, row1, epilogue, scratch.data());
    });
  };
  const Written expected = run(kernels_scalar.conv[0]);
  bool good = true;
  const int largest_code = std::max(c.hi, -c.lo), largest_weight = std::max(c.weight_hi, -c.weight_lo);
  const bool sums_fit = taps * largest_code * largest_weight <= INT16_MAX;
  std::vector<int32_t> sums(sums_fit ? count : 0);
  if (sums_fit) {
    Conv plain = c;
    const std::vector<int32_t> ones(c.outputs, 1), zeros(c.outputs, 0);
    plain.m = ones.data(), plain.b = zeros.data(), plain.shift = 0;
    Block packed(kernels_scalar.conv[0].packed_bytes(plain)), scratch(1);
    kernels_scalar.conv[0].pack(plain, packed.data());
    Epilogue epilogue{};
    epilogue.out = exact(sums);
    kernels_scalar.conv[0].run(plain, packed.data(), picture.data(), row0, row1, epilogue, scratch.data());
  }
  for (const Kernels* const* set = available_kernels(); *set; ++set)
    for (int v = 0; v < kVariants; ++v) {
      const ConvKernel& kernel = (*set)->conv[v];
      if (!kernel.run || !kernel.supported(c)) continue;
      snprintf(g_now, sizeof g_now, "%s %s: %s rows %d..%d", (*set)->name, variant_name(static_cast<Variant>(v)), text(c).c_str(), row0, row1);
      if (!may_support(static_cast<Variant>(v), c) || !(run(kernel) == expected)) {
        printf("DIFFERENT: %s %s: %s rows %d..%d\n", (*set)->name, variant_name(static_cast<Variant>(v)), text(c).c_str(),
               row0, row1);
        good = false;
      }
      if (!sums_fit || !(*set)->lif_sums) continue;
      Block packed(kernel.packed_bytes(c)), scratch(kernel.scratch_bytes(c, row1 - row0));
      kernel.pack(c, packed.data());
      std::vector<int16_t> found(count, 0x5a5a);
      Epilogue epilogue{};
      epilogue.sums = exact(found);
      kernel.run(c, packed.data(), picture.data(), row0, row1, epilogue, scratch.data());
      if (!std::equal(found.begin(), found.end(), sums.begin())) {
        printf("DIFFERENT SUMS: %s %s: %s rows %d..%d\n", (*set)->name, variant_name(static_cast<Variant>(v)), text(c).c_str(),
               row0, row1);
        good = false;
      }
    }
  return good;
}

// ------------------------------------------------------------------------------------------------ all the rest
template <class T, class Run>
bool same(const char* what, size_t count, Run run) {
  std::vector<T> expected(count, T{0x5a});
  run(kernels_scalar, exact(expected));
  bool good = true;
  for (const Kernels* const* set = available_kernels(); *set; ++set) {
    std::vector<T> found(count, T{0x5a});
    run(**set, exact(found));
    if (found != expected) printf("DIFFERENT: %s %s, %zu values\n", (*set)->name, what, count), good = false;
  }
  return good;
}

bool check_elementwise(Random& r) {
  const size_t rows = r.between(1, 9), channels = r.between(1, 70), count = rows * channels;
  std::vector<int32_t> x(count), other(count);
  for (int32_t& v : x) v = some_int32(r);
  for (int32_t& v : other) v = some_int32(r);
  const bool per_channel = r.chance(50);
  const std::vector<int32_t> m = numbers(r, per_channel ? channels : 1, true), b = numbers(r, per_channel ? channels : 1, false);
  const int shift = some_shift(r);
  exact(x), exact(other);
  const bool is_signed = r.chance(50);
  const int lo = is_signed ? -127 : 0, hi = r.pick({1, 4, 127});
  bool good = same<uint8_t>("quantize", count, [&](const Kernels& k, uint8_t* y) {
    k.quantize(x.data(), rows, channels, m.data(), per_channel, shift, lo, hi, is_signed, y);
  });
  std::vector<uint8_t> codes(count);
  for (uint8_t& v : codes) v = static_cast<uint8_t>(r.next());
  const Kind kind = static_cast<Kind>(r.between(0, 2));
  const void* from = kind == Kind::i32 ? static_cast<const void*>(x.data()) : exact(codes);
  good &= same<int32_t>("affine", count, [&](const Kernels& k, int32_t* y) {
    k.affine(kind, from, rows, channels, m.data(), b.data(), per_channel, shift, y);
  });
  good &= same<int32_t>("add", count, [&](const Kernels& k, int32_t* y) { k.add(x.data(), other.data(), count, y); });
  const int32_t factor = static_cast<int32_t>(r.between(-1000, 1000));
  good &= same<int32_t>("mean", channels, [&](const Kernels& k, int32_t* y) {
    k.mean(kind, from, rows, channels, channels, factor, y);
  });
  std::vector<int8_t> table(channels * 256);
  for (int8_t& v : table) v = static_cast<int8_t>(r.next());
  good &= same<int8_t>("lookup", count, [&](const Kernels& k, int8_t* y) {
    k.lookup(exact(codes), rows, channels, exact(table), y);
  });
  const Epilogues e = some_epilogue(r, static_cast<int>(channels));
  const Written expected = write(e, other, count, [&](const Epilogue& ep) { kernels_scalar.finish(x.data(), rows, channels, ep); });
  for (const Kernels* const* set = available_kernels(); *set; ++set)
    if (!(write(e, other, count, [&](const Epilogue& ep) { (*set)->finish(x.data(), rows, channels, ep); }) == expected))
      printf("DIFFERENT: %s finish %zu x %zu\n", (*set)->name, rows, channels), good = false;
  return good;
}

bool check_neurons(Random& r) {
  const int steps = static_cast<int>(r.between(1, 6));
  const size_t count = r.between(1, 70);
  const bool repeat = r.chance(30);
  std::vector<int32_t> x(repeat ? count : count * steps);
  const bool tame = r.chance(60);
  for (int32_t& v : x) v = tame ? static_cast<int32_t>(r.between(-3000, 5000)) : some_int32(r);
  exact(x);
  const size_t stride = repeat ? 0 : count;
  Lif p{};
  p.decay_m = tame ? static_cast<int32_t>(r.between(0, 256)) : some_m(r), p.decay_s = tame ? 8 : some_shift(r);
  p.gain_m = tame ? static_cast<int32_t>(r.between(1, 256)) : some_m(r), p.gain_s = tame ? 8 : some_shift(r);
  if (r.chance(20)) p.decay_m = p.gain_m = 1, p.decay_s = p.gain_s = 1;
  p.threshold = tame ? 1024 : some_int32(r), p.steps = steps, p.strict = r.chance(50);
  p.reset = static_cast<Lif::Reset>(r.between(0, 2));
  bool good = same<uint8_t>("lif", count * steps, [&](const Kernels& k, uint8_t* y) { k.lif(p, x.data(), count, stride, y, count); });
  PackedLif packed{p, tame ? static_cast<int32_t>(r.between(-99, 2048)) : some_int32(r), nullptr, 0, nullptr};
  std::vector<int32_t> table((1u << r.between(2, 8)) - 2);
  const int64_t gap = r.chance(70) ? r.between(1, 1 << r.between(0, 23)) : 0;  // 0: anything, sorted
  for (size_t i = 0; i < table.size(); ++i)
    table[i] = gap ? static_cast<int32_t>((static_cast<int64_t>(i) - static_cast<int64_t>(table.size() / 2)) * gap) : some_int32(r);
  std::sort(table.begin(), table.end());
  std::vector<uint32_t> words(make_buckets(exact(table), static_cast<int>(table.size()), nullptr, nullptr));
  Buckets buckets{};
  if (!words.empty()) make_buckets(table.data(), static_cast<int>(table.size()), exact(words), &buckets), packed.buckets = &buckets;
  if (r.chance(80)) packed.table = table.data(), packed.entries = static_cast<int>(table.size());
  else packed.buckets = nullptr;
  good &= same<uint8_t>("lif_packed", count * steps, [&](const Kernels& k, uint8_t* y) {
    k.lif_packed(packed, x.data(), count, stride, y, count);
  });
  IeLif q{};
  q.decay_m = p.decay_m, q.decay_s = p.decay_s, q.levels = r.pick({1, 4, 8, 255}), q.steps = steps;
  q.fraction_bits = static_cast<int>(tame ? 10 : r.between(0, 30));
  return good & same<uint8_t>("ielif", count * steps, [&](const Kernels& k, uint8_t* y) { k.ielif(q, x.data(), count, stride, y, count); });
}

// Neurons on sums against the definition: potentials, then scalar neurons. Numbers are round, so that many potentials lie on a threshold.
bool check_lif_of_sums(Random& r, uint64_t& proved) {
  const int steps = static_cast<int>(r.between(1, 5)), outputs = static_cast<int>(r.between(1, 70));
  const size_t pixels = r.between(1, 9), count = pixels * outputs;
  const int unit = static_cast<int>(r.between(8, 20));  // threshold: 16 << unit
  Conv c{};
  c.kernel_h = c.kernel_w = 1, c.channels = static_cast<int>(r.between(1, 200)), c.groups = 1, c.outputs = outputs;
  c.hi = r.pick({1, 1, 4}), c.weight_lo = -1, c.weight_hi = r.pick({1, 7}), c.shift = static_cast<int>(r.between(0, 8));
  const int most = c.channels * c.hi * c.weight_hi;
  std::vector<int32_t> m(outputs), b(outputs);
  for (int o = 0; o < outputs; ++o) {
    const int64_t one = (int64_t{1} << (unit + c.shift)) / r.pick({1, 2, 4, 16});
    m[o] = static_cast<int32_t>(std::min<int64_t>(INT32_MAX, r.chance(70) ? one : r.between(-one, one)));
    b[o] = static_cast<int32_t>(r.chance(50) ? 0 : r.between(-8, 8) * (r.chance(50) ? 1 : int64_t{1} << unit));
  }
  c.m = exact(m), c.b = exact(b);
  Lif p{};
  p.threshold = 16 << unit, p.steps = steps, p.strict = r.chance(50), p.reset = static_cast<Lif::Reset>(r.between(0, 2));
  p.gain_m = 1, p.gain_s = static_cast<int>(r.between(0, 2)), p.decay_m = 1, p.decay_s = static_cast<int>(r.between(0, 2));
  if (r.chance(30)) p.gain_m = static_cast<int32_t>(r.between(1, 300)), p.gain_s = 8;
  PackedLif packed{p, r.chance(70) ? p.threshold : static_cast<int32_t>(r.between(-p.threshold, 2 * p.threshold)), nullptr, 0, nullptr};
  std::vector<int32_t> table;
  if (r.chance(60)) {
    table.resize((1u << r.between(4, 8)) - 2);
    const double steep = r.between(1, 40) / 10.0;
    for (size_t i = 0; i < table.size(); ++i)  // evenly, or ever wider towards the ends
      table[i] = static_cast<int32_t>((2.0 * i / table.size() - 1) * p.threshold * (1 + steep * (2.0 * i / table.size() - 1) * (2.0 * i / table.size() - 1)));
    packed.lif.decay_m = static_cast<int32_t>(r.between(0, 2 * p.threshold / static_cast<int>(table.size()))), packed.lif.decay_s = 1;
    packed.table = exact(table), packed.entries = static_cast<int>(table.size());
  }
  std::vector<uint32_t> words(make_buckets(packed.table, packed.entries, nullptr, nullptr));
  Buckets buckets{};
  if (!words.empty()) make_buckets(table.data(), packed.entries, exact(words), &buckets), packed.buckets = &buckets;
  const int kind = static_cast<int>(r.between(0, 3));  // of residual: none, potentials, codes; or potentials and no sums
  const Scaled scaled{static_cast<int32_t>(r.between(0, 32) * (1 << unit)), static_cast<int32_t>(r.between(-3, 3) * (1 << unit)), r.pick({0, 1, 3}), 4};
  const bool repeated = r.chance(20);
  std::vector<int16_t> sums((repeated ? 1 : steps) * count);
  std::vector<int32_t> residual(sums.size()), x(sums.size());
  std::vector<uint8_t> codes(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    sums[i] = static_cast<int16_t>(r.between(-std::min(most, 40), std::min(most, 40)));
    residual[i] = r.chance(1) ? some_int32(r) : static_cast<int32_t>(r.between(-20, 20) * (1 << unit));
    codes[i] = static_cast<uint8_t>(r.between(0, scaled.hi));
    const int o = static_cast<int>(i % outputs);
    const int64_t more = kind % 2 == 1 ? residual[i] : kind == 2 ? sat32(rshift(int64_t{codes[i]} * scaled.m, scaled.shift) + scaled.b) : 0;
    x[i] = sat32(kind == 3 ? more : int64_t{sat32(rshift(int64_t{sums[i]} * m[o], c.shift) + b[o])} + more);
  }
  const size_t step = repeated ? 0 : count;
  std::vector<uint8_t> expected(steps * count, 0x5a);
  kernels_scalar.lif_packed(packed, exact(x), count, step, exact(expected), count);
  const LifOfSums numbers = kind == 3 ? LifOfSums(packed) : LifOfSums(c, packed, kind == 1, kind == 2 ? &scaled : nullptr);
  if (!numbers.get()) return true;
  ++proved;
  const Drives drives{kind == 3 ? nullptr : exact(sums), step, kind % 2 == 1 ? exact(residual) : nullptr, kind == 2 ? exact(codes) : nullptr, step};
  bool good = true;
  for (const Kernels* const* set = available_kernels(); *set; ++set) {
    if (!(*set)->lif_sums) continue;
    std::vector<uint8_t> found(steps * count, 0x5a);
    (*set)->lif_sums(*numbers.get(), drives, pixels, outputs, exact(found), count);
    if (found != expected) printf("DIFFERENT: %s lif_sums, %zu x %d, %d steps\n", (*set)->name, pixels, outputs, steps), good = false;
  }
  return good;
}

template <class T>
bool check_maxpool(Random& r, Kind kind) {
  Pool p{};
  p.kind = kind;
  p.kernel_h = static_cast<int>(r.between(1, 4)), p.kernel_w = static_cast<int>(r.between(1, 4));
  p.stride_h = static_cast<int>(r.between(1, 3)), p.stride_w = static_cast<int>(r.between(1, 3));
  p.pad_h = static_cast<int>(r.between(0, p.kernel_h - 1)), p.pad_w = static_cast<int>(r.between(0, p.kernel_w - 1));
  p.height = static_cast<int>(r.between(p.kernel_h, 9)), p.width = static_cast<int>(r.between(p.kernel_w, 9));
  p.channels = static_cast<int>(r.between(1, 70));
  p.out_height = (p.height + 2 * p.pad_h - p.kernel_h) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.kernel_w) / p.stride_w + 1;
  std::vector<T> image(static_cast<size_t>(p.height) * p.width * p.channels);
  for (T& v : image) v = static_cast<T>(some_int32(r));
  exact(image);
  return same<T>("maxpool", static_cast<size_t>(p.out_height) * p.out_width * p.channels,
                 [&](const Kernels& k, T* y) { k.maxpool(p, image.data(), 0, p.out_height, y); });
}

bool check_attention(Random& r) {
  Attention a{};
  const int heads = static_cast<int>(r.between(1, 3));
  a.head_channels = r.chance(50) ? static_cast<int>(r.between(1, 40)) : r.pick({1, 8, 16, 31, 32, 33, 45, 64, 65, 100});
  a.tokens = r.chance(50) ? static_cast<int>(r.between(1, 40)) : r.pick({1, 3, 15, 16, 17, 32, 33, 63, 64, 65, 80, 128, 196, 260});
  a.channels = heads * a.head_channels;
  a.m = some_m(r), a.shift = some_shift(r);
  if (r.chance(30)) a.m = 1 << r.between(0, 30);
  int most[3];  // of q, k and v
  for (int& code : most) code = r.pick({1, 1, 4, 8, 15, 100, 255});
  while (int64_t{a.tokens} * a.head_channels * most[0] * most[1] * most[2] > INT32_MAX) *std::max_element(most, most + 3) /= 2;
  const size_t count = static_cast<size_t>(a.tokens) * a.channels;
  std::vector<uint8_t> q(count), k(count), v(count);
  const int density = r.pick({0, 5, 50, 100});
  const bool largest = r.chance(30);
  for (size_t i = 0; i < count; ++i) {
    q[i] = static_cast<uint8_t>(r.chance(density) ? r.between(largest ? most[0] : 0, most[0]) : 0);
    k[i] = static_cast<uint8_t>(r.chance(density) ? r.between(largest ? most[1] : 0, most[1]) : 0);
    v[i] = static_cast<uint8_t>(r.chance(density) ? most[2] : 0);
  }
  exact(q), exact(k), exact(v);
  return same<int32_t>("attention", count, [&](const Kernels& set, int32_t* y) {
    Block scratch(set.attention_scratch_bytes(a));
    for (int h = 0; h < heads; ++h) {
      const size_t at = static_cast<size_t>(h) * a.head_channels;
      set.attention(a, q.data() + at, k.data() + at, v.data() + at, y + at, scratch.data());
    }
  });
}

bool check_maps(Random& r) {
  const Heads s{static_cast<size_t>(r.between(1, 70)), static_cast<size_t>(r.between(1, 3)), static_cast<size_t>(r.between(1, 70))};
  const size_t count = s.tokens * s.heads * s.width;
  const bool flip = r.chance(50);
  const size_t side = flip ? s.tokens : s.width, first = r.between(0, side - 1), rows = r.between(1, side - first);
  const int density = r.pick({0, 5, 50, 100}), most = r.pick({1, 1, 4, 255});
  std::vector<uint8_t> a(count), b(count), chosen(side * s.heads * side);
  for (std::vector<uint8_t>* v : {&a, &b, &chosen})
    for (uint8_t& x : *v) x = static_cast<uint8_t>(r.chance(density) ? r.between(1, most) : 0);
  exact(a), exact(b), exact(chosen);
  std::vector<int32_t> m(s.heads);
  for (int32_t& v : m) v = some_m(r);
  exact(m);
  const int shift = some_shift(r);
  bool good = same<int32_t>("attention_map", rows * s.heads * side, [&](const Kernels& k, int32_t* y) {
    Block scratch(k.maps.map_scratch_bytes(s, flip, rows));
    k.maps.map(s, flip, a.data(), b.data(), first, first + rows, m[0], shift, y, scratch.data());
  });
  const size_t token = r.between(0, s.tokens - 1), tokens = r.between(1, s.tokens - token);
  return good & same<int32_t>("attention_read", tokens * s.heads * s.width, [&](const Kernels& k, int32_t* y) {
    Block scratch(k.maps.read_scratch_bytes(s, flip, tokens));
    k.maps.read(s, flip, chosen.data(), a.data(), token, tokens, m.data(), shift, y, scratch.data());
  });
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGSEGV, on_fault), signal(SIGBUS, on_fault);
  if (argc < 2) return fprintf(stderr, "usage: %s SECONDS [SEED]\n", argv[0]), 2;
  const double seconds = atof(argv[1]);
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  printf("kernels:");
  for (const Kernels* const* set = available_kernels(); *set; ++set) printf(" %s", (*set)->name);
  printf("\n");
  const auto began = std::chrono::steady_clock::now();
  uint64_t round = 0, proved = 0;  // proved: neurons that could be done on sums
  int failed = 0;
  do {
    Random r(seed * 1000003 + round);
    bool good = check_conv(r) && check_conv(r);
    switch (round % 4) {
      case 0: good &= check_elementwise(r); break;
      case 1: good &= check_neurons(r) & check_lif_of_sums(r, proved) & check_lif_of_sums(r, proved); break;
      case 2: good &= r.chance(50) ? check_maxpool<uint8_t>(r, Kind::u8) : r.chance(50) ? check_maxpool<int8_t>(r, Kind::s8)
                                                                                        : check_maxpool<int32_t>(r, Kind::i32);
        break;
      default: good &= check_attention(r) & check_maps(r);
    }
    if (!good) {
      printf("  in round %llu of seed %llu\n", static_cast<unsigned long long>(round), static_cast<unsigned long long>(seed));
      if (++failed >= 10) break;
    }
    ++round;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() < seconds);
  printf("%llu rounds, %d failed; %llu neurons on sums\n", static_cast<unsigned long long>(round), failed,
         static_cast<unsigned long long>(proved));
  return failed ? 1 : 0;
}
