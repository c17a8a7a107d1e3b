// Event-driven convolution: only codes that are not 0 cost anything. A code n is n events, and an event is the addition
// of one row of weights, 8 bits wide, to partial sums of 8 bits.
//
// Bound: `budget` = the largest n with n * weight_hi <= 127 and n * weight_lo >= -128 (at least 1). At most `budget` rows
// are added before the partial sums are flushed into int32 accumulators, so no partial sum can leave -128..127, whatever
// the order. The int32 accumulators hold because |acc| < 2^31 is a promise of the caller and int32 addition is modulo 2^32.
//
// Weights of 4 bits are kept two to a byte, as w + 8, for half the memory traffic, which is what limits these kernels: their
// partial sums are unsigned, 17 rows of at most 15 each stay below 256, and 8 times the events is taken off at the end.
// Where three operands make one instruction (V::kCarrySave), 8 rows at a time go through carry-save adders first, bit by
// bit: 14 logical instructions leave one row of eights to unpack and add, where adding each row takes 5 instructions.
//
// Events of a window are gathered once per output pixel as a list of row numbers; every block of outputs then runs through
// the list. Lists of the input's pixels are made row by row and kept for the kernel_h rows a window spans.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

constexpr int kEventSlack = 64;  // entries that may be written past the end of a list

// Packed: per block of kRows * V::kBytes outputs, int8 weights [taps * channels][outputs of the block], the last block as
// narrow as it can be; then m and b, int32, rounded up to whole vectors. Within a vector of bytes, byte 4 i + j is output
// j * kLanes + i, so that a flush gives outputs in their order.
template <class V>
struct EventPacking {
  bool nibbles;
  size_t rows, stored, vectors, vector_bytes, weights, bytes;  // stored: rows and one of zero bytes, which fills groups
  int8_t* weight;
  int32_t *m, *b;
  int *budget, *fits;

  EventPacking(const Conv& c, const void* packed) {
    rows = static_cast<size_t>(c.kernel_h) * c.kernel_w * c.channels;
    stored = rows + 1;
    nibbles = c.weight_lo >= -8 && c.weight_hi <= 7 && c.outputs > V::kBytes;
    vectors = round_up(c.outputs, nibbles ? 2 * V::kBytes : V::kBytes) / V::kBytes;
    vector_bytes = nibbles ? V::kBytes / 2 : V::kBytes;
    weights = round_up(stored * vectors * vector_bytes, 64);
    bytes = weights + 2 * vectors * V::kBytes * sizeof(int32_t) + 64;
    char* p = static_cast<char*>(const_cast<void*>(packed));
    weight = reinterpret_cast<int8_t*>(p);
    m = reinterpret_cast<int32_t*>(p + weights);
    b = m + vectors * V::kBytes;
    budget = b + vectors * V::kBytes;
    fits = budget + 1;
  }
};

template <class V>
bool events_supported(const Conv& c) {
  return may_support(Variant::events, c) && c.groups == 1 && c.hi <= 15 &&
         static_cast<size_t>(c.kernel_h) * c.kernel_w * c.channels < 65536;
}

template <class V>
size_t events_packed_bytes(const Conv& c) {
  return EventPacking<V>(c, nullptr).bytes;
}

template <class V>
void events_pack(const Conv& c, void* packed) {
  const EventPacking<V> p(c, packed);
  memset(packed, 0, p.bytes);
  for (size_t v = 0; v < p.vectors;) {
    const size_t n = p.vectors - v < V::kEventRows ? p.vectors - v : V::kEventRows;
    int8_t* block = p.weight + v * p.vector_bytes * p.stored;
    for (size_t byte = 0; byte < n * V::kBytes; ++byte) {
      const size_t in_vector = byte % V::kBytes;
      const size_t o = (v + byte / V::kBytes) * V::kBytes + in_vector % 4 * V::kLanes + in_vector / 4;
      if (o >= static_cast<size_t>(c.outputs)) continue;
      const int8_t* w = c.weight + o * p.rows;
      if (p.nibbles) {
        const size_t pair = byte / V::kBytes / 2 * V::kBytes + in_vector;
        const int shift = byte / V::kBytes % 2 ? 4 : 0;
        for (size_t row = 0; row < p.rows; ++row) {
          int8_t& two = block[row * n * p.vector_bytes + pair];
          two = static_cast<int8_t>(static_cast<uint8_t>(two) | (w[row] + 8) << shift);
        }
      } else {
        for (size_t row = 0; row < p.rows; ++row) block[row * n * V::kBytes + byte] = w[row];
      }
    }
    v += n;
  }
  memcpy(p.m, c.m, c.outputs * sizeof(int32_t));
  memcpy(p.b, c.b, c.outputs * sizeof(int32_t));
  const int up = c.weight_hi > 0 ? 127 / c.weight_hi : 127, down = c.weight_lo < 0 ? 128 / -c.weight_lo : 127;
  *p.fits = requant_fits(c);
  *p.budget = up < down ? up : down;
}

// The scratch: lists of row numbers. A list of one pixel has at most channels * hi entries.
struct EventLists {
  size_t pixel, row, window, bytes;
  uint16_t *pad, *rows, *gathered;
  uint32_t* starts;  // [kernel_h][width + 1]

  EventLists(const Conv& c, void* scratch) {
    pixel = static_cast<size_t>(c.channels) * (c.hi > 0 ? c.hi : 1);
    row = c.width * pixel + kEventSlack;
    window = c.kernel_h * c.kernel_w * pixel + kEventSlack;
    starts = static_cast<uint32_t*>(scratch);
    pad = reinterpret_cast<uint16_t*>(starts + round_up(static_cast<size_t>(c.kernel_h) * (c.width + 1), 16));
    gathered = pad + pixel + kEventSlack;
    rows = gathered + window;
    bytes = static_cast<size_t>(reinterpret_cast<char*>(rows + c.kernel_h * row) - static_cast<char*>(scratch));
  }
};

template <class V>
size_t events_scratch_bytes(const Conv& c, int) {
  return EventLists(c, nullptr).bytes;
}

// N vectors of bytes, all of the list, into 4 N int32 vectors.
template <class V, int N>
void add_events(const int8_t* weight, const uint16_t* list, size_t count, size_t budget, typename V::I32* acc) {
  constexpr size_t kRow = static_cast<size_t>(N) * V::kBytes;
  for (int i = 0; i < 4 * N; ++i) acc[i] = V::zero();
  while (count > 0) {
    const size_t now = count < budget ? count : budget;
    typename V::I32 part[N];
    const int8_t* w = weight + list[0] * kRow;
    for (int n = 0; n < N; ++n) part[n] = V::load_bytes(w + n * V::kBytes);
    for (size_t e = 1; e < now; ++e) {
      w = weight + list[e] * kRow;
      for (int n = 0; n < N; ++n) part[n] = V::add8(part[n], w + n * V::kBytes);
    }
    for (int n = 0; n < N; ++n) V::flush8(acc + 4 * n, part[n]);
    list += now;
    count -= now;
  }
}

// The same for weights of 4 bits: vector 2 j in the low halves of bytes, 2 j + 1 in the high ones.
template <class V, int N>
void add_nibble_events(const int8_t* weight, const uint16_t* list, size_t count, typename V::I32* acc) {
  constexpr size_t kRow = static_cast<size_t>(N) * V::kBytes / 2, kBudget = 255 / 15;
  const typename V::I32 start = V::splat(static_cast<int32_t>(0u - 8u * static_cast<uint32_t>(count)));
  for (int i = 0; i < 4 * N; ++i) acc[i] = start;
  while (count > 0) {
    const size_t now = count < kBudget ? count : kBudget;
    typename V::I32 part[N];
    for (int n = 0; n < N; ++n) part[n] = V::zero();
    for (size_t e = 0; e < now; ++e) {
      const int8_t* w = weight + list[e] * kRow;
      for (int n = 0; n < N; n += 2) {
        const typename V::I32 two = V::load_bytes(w + n / 2 * V::kBytes);
        part[n] = V::add8(part[n], V::low_nibbles(two));
        part[n + 1] = V::add8(part[n + 1], V::low_nibbles(V::shift_right_zero(two, 4)));
      }
    }
    for (int n = 0; n < N; ++n) V::flush8_unsigned(acc + 4 * n, part[n]);
    list += now;
    count -= now;
  }
}

// The same by carry-save adders: one, two and four are rows of 4-bit numbers of that weight, eights are added up in bytes.
// `nothing` is the number of the row of zero bytes.
template <class V, int N>
void add_nibble_groups(const int8_t* weight, const uint16_t* list, size_t count, uint16_t nothing, typename V::I32* acc) {
  using I32 = typename V::I32;
  constexpr size_t kRow = static_cast<size_t>(N) * V::kBytes / 2, kGroup = 8;
  constexpr int kBudget = 255 / 15;
  const I32 start = V::splat(static_cast<int32_t>(0u - 8u * static_cast<uint32_t>(count)));
  for (int i = 0; i < 4 * N; ++i) acc[i] = start;
  I32 one[N / 2], two[N / 2], four[N / 2], eights[N];
  for (int n = 0; n < N / 2; ++n) one[n] = two[n] = four[n] = V::zero();
  for (int n = 0; n < N; ++n) eights[n] = V::zero();
  uint16_t last[kGroup];
  int groups = 0;
  for (size_t e = 0; e < count; e += kGroup) {
    const uint16_t* rows = list + e;
    if (count - e < kGroup) {
      for (size_t i = 0; i < kGroup; ++i) last[i] = e + i < count ? rows[i] : nothing;
      rows = last;
    }
    const int8_t* from[kGroup];
    for (size_t i = 0; i < kGroup; ++i) from[i] = weight + rows[i] * kRow;
    for (int n = 0; n < N / 2; ++n) {
      // a + b + sum becomes sum + 2 * (what is returned).
      const auto carry = [](I32& sum, I32 a, I32 b) {
        const I32 over = V::majority(sum, a, b);
        sum = V::parity(sum, a, b);
        return over;
      };
      const auto row = [&](int i) { return V::load_bytes(from[i] + n * V::kBytes); };
      const I32 twos0 = carry(one[n], row(0), row(1)), twos1 = carry(one[n], row(2), row(3));
      const I32 fours0 = carry(two[n], twos0, twos1);
      const I32 twos2 = carry(one[n], row(4), row(5)), twos3 = carry(one[n], row(6), row(7));
      const I32 fours1 = carry(two[n], twos2, twos3);
      const I32 eight = carry(four[n], fours0, fours1);
      eights[2 * n] = V::add8(eights[2 * n], V::low_nibbles(eight));
      eights[2 * n + 1] = V::add8(eights[2 * n + 1], V::low_nibbles(V::shift_right_zero(eight, 4)));
    }
    if (++groups == kBudget) {
      for (int n = 0; n < N; ++n) V::template flush8_unsigned<8>(acc + 4 * n, eights[n]), eights[n] = V::zero();
      groups = 0;
    }
  }
  for (int n = 0; n < N; ++n) {
    const auto half = [&](I32 v) { return V::low_nibbles(n % 2 ? V::shift_right_zero(v, 4) : v); };
    const I32 fours = half(four[n / 2]), twos = V::add8(half(two[n / 2]), V::add8(fours, fours));
    V::template flush8_unsigned<1>(acc + 4 * n, V::add8(half(one[n / 2]), V::add8(twos, twos)));  // at most 7 * 15
    V::template flush8_unsigned<8>(acc + 4 * n, eights[n]);
  }
}

template <class V, int N, class Finish>
void events_block(const Conv& c, const EventPacking<V>& p, size_t vector, const uint16_t* list, size_t count, size_t y,
                  const typename V::Scale& scale, const Finish& write) {
  typename V::I32 acc[4 * N];
  const int8_t* weight = p.weight + vector * p.vector_bytes * p.stored;
  if constexpr (N % 2 == 0) {
    if (p.nibbles) {
      if constexpr (V::kCarrySave) add_nibble_groups<V, N>(weight, list, count, static_cast<uint16_t>(p.rows), acc);
      else add_nibble_events<V, N>(weight, list, count, acc);
    } else {
      add_events<V, N>(weight, list, count, *p.budget, acc);
    }
  } else {
    add_events<V, N>(weight, list, count, *p.budget, acc);
  }
  for (int i = 0; i < 4 * N; ++i) {
    const int o = static_cast<int>(vector) * V::kBytes + i * V::kLanes;
    if (o >= c.outputs) break;
    const Requantize<V, Finish::kFits> requantize(p.m + o, p.b + o);
    write(y + o, o, at_most(c.outputs - o, V::kLanes), requantize(acc[i], scale));
  }
}

// The lists of one row of the input's pixels.
template <class V>
void list_row(const Conv& c, const uint8_t* image, int y, const EventLists& lists) {
  const int slot = y % c.kernel_h;
  uint32_t* starts = lists.starts + static_cast<size_t>(slot) * (c.width + 1);
  uint16_t* to = lists.rows + slot * lists.row;
  const uint8_t* codes = image + static_cast<size_t>(y) * c.width * c.channels;
  size_t count = 0;
  for (int x = 0; x < c.width; ++x, codes += c.channels) {
    starts[x] = static_cast<uint32_t>(count);
    count = V::append_events(to, count, codes, c.channels);
  }
  starts[c.width] = static_cast<uint32_t>(count);
}

template <class V, class Finish>
void events_rows(const Conv& c, const EventPacking<V>& p, const void* image, int row0, int row1, const Finish& write,
                 void* scratch) {
  const EventLists lists(c, scratch);
  const typename V::Scale scale(c.shift);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  size_t pad_count = 0;
  for (int i = 0; i < c.channels; ++i)
    for (int n = 0; n < c.pad_value[i]; ++n) lists.pad[pad_count++] = static_cast<uint16_t>(i);
  int listed = 0;  // rows before this one have been listed, as far as they are needed
  size_t at = 0;
  for (int oy = row0; oy < row1; ++oy) {
    const int top = oy * c.stride_h - c.pad_h;
    if (listed < top) listed = top;
    for (; listed < top + c.kernel_h && listed < c.height; ++listed) list_row<V>(c, codes, listed, lists);
    for (int ox = 0; ox < c.out_width; ++ox, at += c.outputs) {
      const int left = ox * c.stride_w - c.pad_w;
      const uint16_t* list = lists.gathered;
      size_t count = 0;
      uint16_t row = 0;
      for (int y = top; y < top + c.kernel_h; ++y) {
        const int slot = y % c.kernel_h;
        for (int x = left; x < left + c.kernel_w; ++x, row = static_cast<uint16_t>(row + c.channels)) {
          const uint16_t* from = lists.pad;
          size_t n = pad_count;
          if (y >= 0 && y < c.height && x >= 0 && x < c.width) {
            const uint32_t* start = lists.starts + static_cast<size_t>(slot) * (c.width + 1) + x;
            from = lists.rows + slot * lists.row + start[0];
            n = start[1] - start[0];
          }
          if (c.kernel_h * c.kernel_w == 1) list = from;
          else V::copy_events(lists.gathered + count, from, n, row);
          count += n;
        }
      }
      for (size_t v = 0; v < p.vectors;) {
        const size_t n = p.vectors - v < V::kEventRows ? p.vectors - v : V::kEventRows;
        if (V::kEventRows >= 4 && n == 4) events_block<V, 4>(c, p, v, list, count, at, scale, write);
        else if (V::kEventRows >= 3 && n == 3) events_block<V, 3>(c, p, v, list, count, at, scale, write);
        else if (n == 2) events_block<V, 2>(c, p, v, list, count, at, scale, write);
        else events_block<V, 1>(c, p, v, list, count, at, scale, write);
        v += n;
      }
    }
  }
}

template <class V>
void conv_events(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                 void* scratch) {
  const EventPacking<V> p(c, packed);
  with_finish<V>(e, c.outputs, *p.fits,
                 [&](const auto& write) { events_rows<V>(c, p, image, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

}  // namespace
}  // namespace bitspike
