// The extension module bitspike.data.events._decode: the loops over records of event recordings, and over events for frames.
// Each function does what the numpy code beside its caller does, record by record; the caller reports faults and counts.
// An event is 16 bytes: int64 t, uint16 x, uint16 y, uint8 p and three zero bytes. Little-endian machines only.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using State = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = std::tuple<int64_t, int64_t, int64_t>;  // events written, records used, what is wrong with the next one

constexpr int64_t kEvent = 16;

template <class T>
inline T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline uint32_t swapped(uint32_t v) { return v >> 24 | (v >> 8 & 0xFF00) | (v << 8 & 0xFF0000) | v << 24; }

inline uint8_t* put(uint8_t* out, int64_t t, uint64_t x, uint64_t y, uint64_t p) {
  const uint64_t rest = x | y << 16 | p << 32;
  std::memcpy(out, &t, 8);
  std::memcpy(out + 8, &rest, 8);
  return out + kEvent;
}

// A counter of `Bits` bits whose overflows are undone, as core.unwrap does: a fall by more than half the range is an overflow,
// a rise by more than 15/16 of it a step back just after one.
template <int Bits>
struct Counter {
  static constexpr int64_t full = int64_t{1} << Bits;
  bool known;
  int64_t before, base;

  explicit Counter(const int64_t* state) : known(state[0] != 0) {
    before = known ? ((state[1] % full) + full) % full : 0;
    base = known ? state[1] - before : 0;
  }
  inline int64_t next(int64_t raw) {
    if (!known) {
      known = true;
      before = raw;
    }
    const int64_t step = raw - before;
    if (step < -(full / 2)) base += full;
    else if (step > full - full / 16) base -= full;
    before = raw;
    return raw + base;
  }
  void save(int64_t* state) const {
    state[0] = known;
    state[1] = before + base;
  }
};

int64_t room(const Out& out) { return static_cast<int64_t>(out.size()) / kEvent; }

void need(bool fits) {
  if (!fits) throw nb::value_error("an array is too small for what is to be written into it");
}

// state: known, last time. x and y as the layout says: 0 "dvs128", 1 "cifar10-dvs", 2 "dvs128-raw".
Result aedat2(const Bytes& raw, const Out& out_array, const State& state, int layout) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 8;
  need(room(out_array) >= number && state.size() >= 2);
  Counter<32> clock(state.data());
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin;
  for (int64_t i = 0; i < number; ++i, in += 8) {
    const uint32_t address = swapped(load<uint32_t>(in));
    const int64_t t = clock.next(swapped(load<uint32_t>(in + 4)));
    if (address > 0x7FFF) continue;
    const uint64_t a = address >> 1 & 0x7F, b = address >> 8 & 0x7F, p = address & 1;
    if (layout == 0) out = put(out, t, 127 - a, 127 - b, 1 - p);
    else if (layout == 1) out = put(out, t, 127 - b, 127 - a, 1 - p);
    else out = put(out, t, a, b, p);
  }
  clock.save(state.data());
  return {(out - begin) / kEvent, number, 0};
}

Result aedat3(const Bytes& raw, const Out& out_array, int64_t overflow) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 8;
  need(room(out_array) >= number);
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin;
  const int64_t base = static_cast<int64_t>(static_cast<uint64_t>(overflow) << 31);
  for (int64_t i = 0; i < number; ++i, in += 8) {
    const uint32_t bits = load<uint32_t>(in);
    if (bits & 1) out = put(out, load<int32_t>(in + 4) + base, bits >> 17, bits >> 2 & 0x7FFF, bits >> 1 & 1);
  }
  return {(out - begin) / kEvent, number, 0};
}

// state: overflows so far
Result nmnist(const Bytes& raw, const Out& out_array, const State& state) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 5;
  need(room(out_array) >= number && state.size() >= 1);
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin;
  int64_t base = state(0) * 8192;
  for (int64_t i = 0; i < number; ++i, in += 5) {
    if (in[1] == 240) {
      base += 8192;
      continue;
    }
    const int64_t t = static_cast<int64_t>(in[2] & 0x7F) << 16 | in[3] << 8 | in[4];
    out = put(out, t + base, in[0], in[1], in[2] >> 7);
  }
  state(0) = base / 8192;
  return {(out - begin) / kEvent, number, 0};
}

// One loop compiled for AVX2 as well, which the loader picks where the processor has it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define BITSPIKE_ALSO_AVX2 __attribute__((noinline, target_clones("avx2", "default")))
#else
#define BITSPIKE_ALSO_AVX2
#endif

// `some` records of a .dat without a branch: written as if nothing were wrong, while what could be wrong is gathered in bits.
struct Watch {
  uint64_t odd = 0;      // not 0: the highest bit of a time is not that of `before`, or a polarity is over 1
  uint64_t outside = 0;  // highest bit 1: an event with x > last_x or y > last_y
};
BITSPIKE_ALSO_AVX2 Watch dat_block(const uint8_t* __restrict in, uint8_t* __restrict out, int64_t some, uint64_t before,
                                   uint64_t base, uint64_t last_x, uint64_t last_y) {
  uint64_t odd = 0, outside = 0;
  for (int64_t k = 0; k < some; ++k) {
    const uint64_t word = load<uint64_t>(in + 8 * k), x = word >> 32 & 0x3FFF, y = word >> 46 & 0x3FFF;
    odd |= ((word ^ before) & 0x80000000) | word >> 61;
    outside |= (last_x - x) | (last_y - y);
    const uint64_t t = (word & 0xFFFFFFFF) + base, rest = x | y << 16 | (word >> 28 & 0xF00000000);
    std::memcpy(out + kEvent * k, &t, 8);
    std::memcpy(out + kEvent * k + 8, &rest, 8);
  }
  return {odd, outside};
}

// state: known, last time; then 1 if an event lay outside height x width. A polarity over 1 is a fault.
//
// Where the highest bit of the time is the same from the record before on, two times are less than half the range apart, so
// that no overflow lies between them. A block with anything else is done over, record by record.
Result dat(const Bytes& raw, const Out& out_array, const State& state, int64_t height, int64_t width) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 8;
  need(room(out_array) >= number && state.size() >= 3);
  Counter<32> clock(state.data());
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin;
  const uint64_t last_x = static_cast<uint64_t>(width) - 1, last_y = static_cast<uint64_t>(height) - 1;
  uint64_t outside = 0;
  int64_t i = 0;
  while (i < number) {
    const int64_t some = std::min<int64_t>(512, number - i);
    const uint64_t before = clock.known ? static_cast<uint64_t>(clock.before) : load<uint32_t>(in);
    const Watch seen = dat_block(in, out, some, before, static_cast<uint64_t>(clock.base), last_x, last_y);
    if (!seen.odd) {
      outside |= seen.outside;
      in += 8 * some, out += kEvent * some, i += some;
      clock.known = true;
      clock.before = load<uint32_t>(in - 8);
      continue;
    }
    int64_t k = 0;
    for (; k < some; ++k, in += 8) {
      const uint32_t bits = load<uint32_t>(in + 4);
      if (bits >> 29) break;
      const uint64_t x = bits & 0x3FFF, y = bits >> 14 & 0x3FFF;
      outside |= (last_x - x) | (last_y - y);
      out = put(out, clock.next(load<uint32_t>(in)), x, y, bits >> 28);
    }
    i += k;
    if (k < some) break;
  }
  clock.save(state.data());
  state.data()[2] = static_cast<int64_t>(outside >> 63);
  return {(out - begin) / kEvent, i, i < number};
}

// state: known, last high part; then counted: triggers, vendor words, events before the first time; then 1 if an event lay
// outside height x width
Result evt2(const Bytes& raw, const Out& out_array, const State& state, int64_t height, int64_t width) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 4;
  need(room(out_array) >= number && state.size() >= 6);
  int64_t* s = state.data();
  Counter<28> clock(s);
  int64_t high = clock.known ? s[1] : 0, triggers = 0, vendor = 0, early = 0, i = 0;
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin;
  const uint64_t last_x = static_cast<uint64_t>(width) - 1, last_y = static_cast<uint64_t>(height) - 1;
  uint64_t outside = 0;
  bool known = clock.known;
  for (; i < number; ++i, in += 4) {
    const uint32_t word = load<uint32_t>(in), kind = word >> 28;
    if (kind <= 1) {
      const uint64_t x = word >> 11 & 0x7FF, y = word & 0x7FF;
      if (!known) {
        ++early;
        continue;
      }
      outside |= (last_x - x) | (last_y - y);
      out = put(out, high * 64 + (word >> 22 & 0x3F), x, y, kind);
    } else if (kind == 8) {
      high = clock.next(word & 0xFFFFFFF);
      known = true;
    } else if (kind == 10) {
      ++triggers;
    } else if (kind >= 14) {
      ++vendor;
    } else {
      break;
    }
  }
  clock.save(s);
  s[2] += triggers, s[3] += vendor, s[4] += early, s[5] = static_cast<int64_t>(outside >> 63);
  return {(out - begin) / kEvent, i, i < number};
}

// state: known, last high part; row, base of vectors, moved on since, low part; then counted: triggers, vendor words, early
// events. Stops before a word for which there might be no room. Faults: 1 a reserved type, otherwise the column it reaches.
Result evt3(const Bytes& raw, const Out& out_array, const State& state) {
  const int64_t number = static_cast<int64_t>(raw.size()) / 2;
  need(state.size() >= 9 && room(out_array) >= 12);
  int64_t* s = state.data();
  Counter<12> clock(s);
  bool known = clock.known;
  int64_t high = known ? s[1] : 0, moved = s[4], low = s[5], fault = 0, i = 0;
  uint64_t row = s[2] & 0x7FF, base = s[3] & 0xFFF;
  int64_t triggers = 0, vendor = 0, early = 0;
  int64_t now = high * 4096 + low;
  const uint8_t* in = raw.data();
  uint8_t *begin = out_array.data(), *out = begin, *last = begin + (room(out_array) - 12) * kEvent;
  for (; i < number && out <= last; ++i, in += 2) {
    const uint32_t word = load<uint16_t>(in), field = word & 0xFFF;
    switch (word >> 12) {
      case 0:
        row = field & 0x7FF;
        break;
      case 2:
        if (known) out = put(out, now, field & 0x7FF, row, field >> 11);
        else ++early;
        break;
      case 3:
        base = field;
        moved = 0;
        break;
      case 4:
      case 5: {
        const bool wide = word >> 12 == 4;
        const uint32_t mask = wide ? field : field & 0xFF;
        const int64_t column = static_cast<int64_t>(base & 0x7FF) + moved;
        if (column > 2047 - 11) {
          int64_t top = column - 1;
          for (uint32_t m = mask; m; m >>= 1) ++top;
          if (top > 2047) {
            fault = top;
            break;
          }
        }
        if (known) {
          const uint64_t p = base >> 11;
          for (uint32_t m = mask, x = static_cast<uint32_t>(column); m; m >>= 1, ++x)
            if (m & 1) out = put(out, now, x, row, p);
        } else {
          for (uint32_t m = mask; m; m &= m - 1) ++early;
        }
        moved += wide ? 12 : 8;
        break;
      }
      case 6:
        low = field;
        now = high * 4096 + low;
        break;
      case 8: {
        const int64_t next = clock.next(field);
        if (!known || next != high) low = 0;  // a changed high half starts the low one from 0, or time would leap
        known = true;
        high = next;
        now = high * 4096 + low;
        break;
      }
      case 10:
        ++triggers;
        break;
      case 7:
      case 14:
      case 15:
        ++vendor;
        break;
      default:
        fault = 1;
    }
    if (fault) break;
  }
  clock.save(s);
  s[2] = static_cast<int64_t>(row), s[3] = static_cast<int64_t>(base), s[4] = moved, s[5] = low;
  s[6] += triggers, s[7] += vendor, s[8] += early;
  return {(out - begin) / kEvent, i, fault};
}

// ------------------------------------------------------------------------------------------------- over events
// The first event outside height x width, or their number.
int64_t first_outside(const Bytes& events, int64_t height, int64_t width) {
  const int64_t number = static_cast<int64_t>(events.size()) / kEvent;
  const uint8_t* in = events.data();
  for (int64_t start = 0; start < number; start += 1024) {
    const int64_t stop = std::min(start + 1024, number);
    uint16_t x = 0, y = 0;
    for (int64_t i = start; i < stop; ++i) {
      x = std::max(x, load<uint16_t>(in + i * kEvent + 8));
      y = std::max(y, load<uint16_t>(in + i * kEvent + 10));
    }
    if (x < width && y < height) continue;
    for (int64_t i = start; i < stop; ++i)
      if (load<uint16_t>(in + i * kEvent + 8) >= width || load<uint16_t>(in + i * kEvent + 10) >= height) return i;
  }
  return number;
}

// Whether the times never fall.
bool is_sorted(const Bytes& events) {
  const int64_t number = static_cast<int64_t>(events.size()) / kEvent;
  const uint8_t* in = events.data();
  int64_t before = number ? load<int64_t>(in) : 0;
  for (int64_t start = 0; start < number; start += 1024) {
    const int64_t stop = std::min(start + 1024, number);
    bool falls = false;
    for (int64_t i = start; i < stop; ++i) {
      const int64_t t = load<int64_t>(in + i * kEvent);
      falls |= t < before;
      before = t;
    }
    if (falls) return false;
  }
  return true;
}

// counts[p, row[y], column[x]] += 1 for the events; row holds offsets of rows, p adds `plane`. All indices must be inside.
void accumulate(const Bytes& events, const Table& row, const Table& column, int64_t plane, const Counts& counts) {
  const int64_t number = static_cast<int64_t>(events.size()) / kEvent;
  const int64_t *rows = row.data(), *columns = column.data();
  const int64_t height = static_cast<int64_t>(row.size()), width = static_cast<int64_t>(column.size());
  need(static_cast<int64_t>(counts.size()) >= 2 * plane && plane > 0);
  const uint8_t* in = events.data();
  int32_t* out = counts.data();
  for (int64_t i = 0; i < number; ++i, in += kEvent) {
    const uint64_t rest = load<uint64_t>(in + 8);
    const int64_t x = rest & 0xFFFF, y = rest >> 16 & 0xFFFF, p = rest >> 32 & 1;
    need(x < width && y < height);
    const int64_t at = p * plane + rows[y] + columns[x];
    need(at >= 0 && at < 2 * plane);
    ++out[at];
  }
}

}  // namespace

NB_MODULE(_decode, m) {
  using nogil = nb::call_guard<nb::gil_scoped_release>;
  m.attr("version") = 2;  // what native.py expects; an older build is not used
  m.def("aedat2", &aedat2, nogil());
  m.def("aedat3", &aedat3, nogil());
  m.def("nmnist", &nmnist, nogil());
  m.def("dat", &dat, nogil());
  m.def("evt2", &evt2, nogil());
  m.def("evt3", &evt3, nogil());
  m.def("first_outside", &first_outside, nogil());
  m.def("is_sorted", &is_sorted, nogil());
  m.def("accumulate", &accumulate, nogil());
}
