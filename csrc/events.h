// Event-driven convolution: only codes that are not 0 cost anything. A code n is n events, and an event is the addition
// of one row of weights, 8 bits wide, to partial sums of 8 bits.
//
// Bound: `budget` = the largest n with n * weight_hi <= 127 and n * weight_lo >= -128 (at least 1). At most `budget` rows
// are added before the partial sums are flushed into int32 accumulators, so no partial sum can leave -128..127, whatever
// the order. The int32 accumulators hold because |acc| < 2^31 is a promise of the caller and int32 addition is modulo 2^32.
//
// Weights of 4 bits are kept two to a byte, as w + 8, for half the memory traffic: their partial sums are unsigned, 17 rows
// of at most 15 each stay below 256, and 8 times the events is taken off at the end. Where three operands make one
// instruction (V::kCarrySave), 8 rows at a time go through carry-save adders first, bit by bit: 14 logical instructions
// leave one row of eights to unpack and add, where adding each row takes 5 instructions.
//
// First the events of a *strip* of output pixels are gathered into lists of row numbers; then come block of outputs, chunk,
// pixel, so that a block's weights stay in the nearest cache for the whole strip. A *chunk* is as many rows of 8-bit weights
// as that cache holds, whose sums wait in memory for the next one; rows of 4-bit weights, half as long and slower to add,
// gain nothing by it and are one chunk. Lists of the input's pixels are kept for the kernel_h rows a window spans.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

constexpr size_t kEventSlack = 64;         // entries that may be written past the end of a list
constexpr size_t kNibbleRows = 8191;       // of 4-bit weights: times kEventEntry, their numbers must fit into 16 bits
constexpr size_t kChunkRows = 576;         // of 8-bit weights, 64 bytes each: three quarters of a first-level cache
constexpr size_t kStripPixels = 48;        // and no more entries than ...
constexpr size_t kStripEntries = 1 << 16;  // ... unless one pixel has more
constexpr size_t kGroup = 8;               // rows that go through carry-save adders together

// Packed: per block of outputs one row of weights per tap and channel, and a last one that adds nothing; then m and b, int32,
// rounded up to whole vectors. Within a vector of bytes, byte 4 i + j is output j * kLanes + i, so that a flush gives outputs
// in their order.
template <class V>
struct EventPacking {
  bool nibbles;
  size_t rows, part, parts, units, per_chunk, chunks;  // a unit is the channels, or a part of them, of one tap
  size_t stored;                                       // rows of a block
  size_t vectors, weights, bytes;
  int channels;
  int8_t* weight;
  int32_t *m, *b;
  int *budget, *fits;

  EventPacking(const Conv& c, const void* packed) : channels(c.channels) {
    const size_t taps = static_cast<size_t>(c.kernel_h) * c.kernel_w, all = c.channels;
    rows = taps * all;
    nibbles = c.weight_lo >= -8 && c.weight_hi <= 7 && c.outputs > V::kBytes && rows <= kNibbleRows;
    const size_t most = nibbles ? kNibbleRows : kChunkRows;  // nibbles: one chunk
    parts = (all + most - 1) / most;
    part = parts == 1 ? all : round_up((all + parts - 1) / parts, 64);
    parts = (all + part - 1) / part;
    units = taps * parts;
    per_chunk = most / part > 0 ? most / part : 1;
    chunks = (units + per_chunk - 1) / per_chunk;
    stored = rows + 1;
    vectors = round_up(c.outputs, nibbles ? 2 * V::kBytes : V::kBytes) / V::kBytes;
    weights = round_up(stored * vectors * (nibbles ? V::kBytes / 2 : V::kBytes), 64);
    bytes = weights + 2 * vectors * V::kBytes * sizeof(int32_t) + 64;
    char* p = static_cast<char*>(const_cast<void*>(packed));
    weight = reinterpret_cast<int8_t*>(p);
    m = reinterpret_cast<int32_t*>(p + weights);
    b = m + vectors * V::kBytes;
    budget = b + vectors * V::kBytes;
    fits = budget + 1;
  }
  size_t unit_row(size_t unit) const { return unit / parts * channels + unit % parts * part; }
  size_t unit_channels(size_t unit) const {
    const size_t left = parts == 1 ? part : channels - unit % parts * part;
    return left < part ? left : part;
  }
  size_t chunk_row(size_t chunk) const { return chunk == chunks ? rows : unit_row(chunk * per_chunk); }
  size_t row_bytes(size_t count) const { return count * (nibbles ? V::kBytes / 2 : V::kBytes); }
  size_t block_vectors(size_t vector) const {
    const size_t most = nibbles ? V::kNibbleVectors : V::kByteVectors;
    return vectors - vector < most ? vectors - vector : most;
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
  int8_t* block = p.weight;
  for (size_t v = 0; v < p.vectors;) {
    const size_t n = p.block_vectors(v);
    const size_t row_bytes = p.row_bytes(n);
    for (size_t byte = 0; byte < n * V::kBytes; ++byte) {
      const size_t in_vector = byte % V::kBytes, vector = byte / V::kBytes;
      const size_t o = (v + vector) * V::kBytes + in_vector % 4 * V::kLanes + in_vector / 4;
      const size_t at = p.nibbles ? vector / 2 * V::kBytes + in_vector : byte;
      const int shift = p.nibbles && vector % 2 ? 4 : 0, add = p.nibbles ? 8 : 0;
      const int8_t* w = o < static_cast<size_t>(c.outputs) ? c.weight + o * p.rows : nullptr;
      for (size_t row = 0; row < p.stored; ++row) {
        const int value = (w && row < p.rows ? w[row] : 0) + add;
        int8_t& to = block[row * row_bytes + at];
        to = static_cast<int8_t>(static_cast<uint8_t>(to) | static_cast<uint8_t>(value) << shift);
      }
    }
    block += p.stored * row_bytes;
    v += n;
  }
  memcpy(p.m, c.m, c.outputs * sizeof(int32_t));
  memcpy(p.b, c.b, c.outputs * sizeof(int32_t));
  const int up = c.weight_hi > 0 ? 127 / c.weight_hi : 127, down = c.weight_lo < 0 ? 128 / -c.weight_lo : 127;
  *p.fits = requant_fits(c);
  *p.budget = up < down ? up : down;
}

// The scratch: lists of row numbers, times kEventEntry. A list of one pixel has at most channels * hi entries.
template <class V>
struct EventLists {
  size_t pixel, row, window, capacity, bytes;
  uint32_t* starts;     // [kernel_h][width * parts + 1], of `rows`
  uint32_t* positions;  // [kStripPixels * chunks + 1], of `strip`
  uint32_t* pads;       // [parts + 1], of `pad`
  int32_t* sums;        // [kStripPixels][accumulators of a block], where there are several chunks
  uint16_t *pad, *rows, *strip;

  EventLists(const Conv& c, const EventPacking<V>& p, void* scratch) {
    const bool ring = c.kernel_h * c.kernel_w > 1;
    pixel = static_cast<size_t>(c.channels) * (c.hi > 0 ? c.hi : 1);
    row = ring ? c.width * pixel + kEventSlack : 0;
    window = c.kernel_h * c.kernel_w * pixel + p.chunks * kGroup;
    capacity = window > kStripEntries ? window : kStripEntries;
    const size_t accumulators = (p.nibbles ? V::kNibbleVectors : V::kByteVectors) * static_cast<size_t>(V::kBytes);
    char* at = static_cast<char*>(scratch);
    const auto take = [&](size_t size) {
      char* found = at;
      at += round_up(size, 64);
      return found;
    };
    sums = reinterpret_cast<int32_t*>(take(p.chunks > 1 ? kStripPixels * accumulators * sizeof(int32_t) : 0));
    starts = reinterpret_cast<uint32_t*>(take(ring ? c.kernel_h * (c.width * p.parts + 1) * sizeof(uint32_t) : 0));
    positions = reinterpret_cast<uint32_t*>(take((kStripPixels * p.chunks + 1) * sizeof(uint32_t)));
    pads = reinterpret_cast<uint32_t*>(take((p.parts + 1) * sizeof(uint32_t)));
    pad = reinterpret_cast<uint16_t*>(take((pixel + kEventSlack) * sizeof(uint16_t)));
    rows = reinterpret_cast<uint16_t*>(take(c.kernel_h * row * sizeof(uint16_t)));
    strip = reinterpret_cast<uint16_t*>(take((capacity + kEventSlack) * sizeof(uint16_t)));
    bytes = static_cast<size_t>(at - static_cast<char*>(scratch));
  }
};

template <class V>
size_t events_scratch_bytes(const Conv& c, int) {
  return EventLists<V>(c, EventPacking<V>(c, nullptr), nullptr).bytes;
}

// N vectors of bytes, all of the list, into 4 N int32 vectors.
template <class V, int N>
void add_events(const int8_t* weight, const uint16_t* list, size_t count, size_t budget, typename V::I32* acc) {
  constexpr size_t kScale = static_cast<size_t>(N) * V::kBytes / kEventEntry;
  while (count > 0) {
    const size_t now = count < budget ? count : budget;
    typename V::I32 part[N];
    for (int n = 0; n < N; ++n) part[n] = V::zero();
    size_t e = 0;
    for (; e + 4 <= now; e += 4) {  // the four first, so that they need not wait for those before
      const int8_t *w0 = weight + list[e] * kScale, *w1 = weight + list[e + 1] * kScale;
      const int8_t *w2 = weight + list[e + 2] * kScale, *w3 = weight + list[e + 3] * kScale;
      for (int n = 0; n < N; ++n) {
        const size_t at = n * V::kBytes;
        part[n] = V::add8(part[n], V::add8(V::add8(V::load_bytes(w0 + at), w1 + at), V::add8(V::load_bytes(w2 + at), w3 + at)));
      }
    }
    for (; e < now; ++e)
      for (int n = 0; n < N; ++n) part[n] = V::add8(part[n], weight + list[e] * kScale + n * V::kBytes);
    for (int n = 0; n < N; ++n) V::flush8(acc + 4 * n, part[n]);
    list += now;
    count -= now;
  }
}

// The same for weights of 4 bits: vector 2 j in the low halves of bytes, 2 j + 1 in the high ones.
template <class V, int N>
void add_nibble_events(const int8_t* weight, const uint16_t* list, size_t count, typename V::I32* acc) {
  constexpr size_t kScale = static_cast<size_t>(N) * V::kBytes / 2 / kEventEntry, kBudget = 255 / 15;
  const typename V::I32 start = V::splat(static_cast<int32_t>(0u - 8u * static_cast<uint32_t>(count)));
  for (int i = 0; i < 4 * N; ++i) acc[i] = start;
  while (count > 0) {
    const size_t now = count < kBudget ? count : kBudget;
    typename V::I32 part[N];
    for (int n = 0; n < N; ++n) part[n] = V::zero();
    for (size_t e = 0; e < now; ++e) {
      const int8_t* w = weight + list[e] * kScale;
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

// The same by carry-save adders, `count` being a multiple of kGroup: one, two and four are rows of 4-bit numbers of that
// weight, eights are added up in bytes. What a group adds to each of them comes in last, so that groups wait for one adder.
template <class V, int N>
void add_nibble_groups(const int8_t* weight, const uint16_t* list, size_t count, typename V::I32* acc) {
  using I32 = typename V::I32;
  constexpr size_t kScale = static_cast<size_t>(N) * V::kBytes / 2 / kEventEntry;
  constexpr int kBudget = 255 / 15;
  const I32 start = V::splat(static_cast<int32_t>(0u - 8u * static_cast<uint32_t>(count)));
  for (int i = 0; i < 4 * N; ++i) acc[i] = start;
  I32 one[N / 2], two[N / 2], four[N / 2], eights[N];
  for (int n = 0; n < N / 2; ++n) one[n] = two[n] = four[n] = V::zero();
  for (int n = 0; n < N; ++n) eights[n] = V::zero();
  int groups = 0;
  for (const uint16_t* end = list + count; list < end; list += kGroup) {
    const int8_t* from[kGroup];
    for (size_t i = 0; i < kGroup; ++i) from[i] = weight + list[i] * kScale;
    for (int n = 0; n < N / 2; ++n) {
      const auto row = [&](int i) { return V::load_bytes(from[i] + n * V::kBytes); };
      // a + b + c as a sum, and what is carried.
      const auto full = [](I32 a, I32 b, I32 c, I32& carry) {
        carry = V::majority(a, b, c);
        return V::parity(a, b, c);
      };
      I32 twos[4], fours[2], eight;
      const I32 ones0 = full(row(0), row(1), row(2), twos[0]), ones1 = full(row(3), row(4), row(5), twos[1]);
      const I32 ones2 = full(row(6), row(7), ones0, twos[2]);
      one[n] = full(ones1, ones2, one[n], twos[3]);
      const I32 more = full(twos[0], twos[1], twos[2], fours[0]);
      two[n] = full(more, twos[3], two[n], fours[1]);
      four[n] = full(fours[0], fours[1], four[n], eight);
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

// From the accumulators of one pixel to what the epilogue writes. It holds copies, for the compiler to know that no code that
// is stored changes them.
template <class V, int N, class Finish>
struct EventsFinish {
  const Finish write;
  const typename V::Scale scale;
  const int32_t *m, *b;
  const int o, outputs;

  void operator()(const typename V::I32* acc, size_t y) const {
    for (int i = 0, at = o; i < 4 * N && at < outputs; ++i, at += V::kLanes) {
      const Requantize<V, Finish::kFits> requantize(m + at, b + at);
      write(y + at, at, at_most(outputs - at, V::kLanes), requantize(acc[i], scale));
    }
  }
};

// A block of outputs for all pixels of a strip, weights of 4 bits; they are in one chunk.
template <class V, int N, class Finish>
void nibble_block(const Conv& c, const EventPacking<V>& p, const EventLists<V>& lists, size_t pixels, const int8_t* weight,
                  size_t y, int o, const typename V::Scale& scale, const Finish& write) {
  const EventsFinish<V, N, Finish> finish{write, scale, p.m, p.b, o, c.outputs};
  for (size_t i = 0; i < pixels; ++i, y += c.outputs) {
    const uint16_t* list = lists.strip + lists.positions[i];
    const size_t count = lists.positions[i + 1] - lists.positions[i];
    typename V::I32 acc[4 * N];
    if constexpr (V::kCarrySave) add_nibble_groups<V, N>(weight, list, count, acc);
    else add_nibble_events<V, N>(weight, list, count, acc);
    finish(acc, y);
  }
}

// The same for weights of 8 bits, chunk by chunk.
template <class V, int N, class Finish>
void byte_block(const Conv& c, const EventPacking<V>& p, const EventLists<V>& lists, size_t pixels, const int8_t* weight,
                size_t y0, int o, const typename V::Scale& scale, const Finish& write) {
  const EventsFinish<V, N, Finish> finish{write, scale, p.m, p.b, o, c.outputs};
  for (size_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int8_t* w = weight + p.chunk_row(chunk) * p.row_bytes(N);
    const uint32_t* position = lists.positions + chunk;
    int32_t* kept = lists.sums;
    size_t y = y0;
    for (size_t i = 0; i < pixels; ++i, position += p.chunks, kept += 4 * N * V::kLanes, y += c.outputs) {
      typename V::I32 acc[4 * N];
      if (chunk == 0)
        for (int k = 0; k < 4 * N; ++k) acc[k] = V::zero();
      else
        for (int k = 0; k < 4 * N; ++k) acc[k] = V::load(kept + k * V::kLanes);
      add_events<V, N>(w, lists.strip + position[0], position[1] - position[0], *p.budget, acc);
      if (chunk + 1 == p.chunks) finish(acc, y);
      else
        for (int k = 0; k < 4 * N; ++k) V::store(kept + k * V::kLanes, acc[k], V::kLanes);
    }
  }
}

// What the lists of column x count from, modulo 2^16. Where units are whole pixels they run on from pixel to pixel, as rows of
// weights do from tap to tap: those of neighbours are then one list for a window, wherever that begins.
template <class V>
uint16_t list_base(const EventPacking<V>& p, int x) {
  return p.parts == 1 ? static_cast<uint16_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(p.part) * kEventEntry) : 0;
}

// The lists of one row of the input's pixels.
template <class V>
void list_row(const Conv& c, const EventPacking<V>& p, const uint8_t* image, int y, const EventLists<V>& lists) {
  const int slot = y % c.kernel_h;
  uint32_t* starts = lists.starts + slot * (c.width * p.parts + 1);
  uint16_t* to = lists.rows + slot * lists.row;
  const uint8_t* codes = image + static_cast<size_t>(y) * c.width * c.channels;
  size_t count = 0;
  for (int x = 0; x < c.width; ++x)
    for (size_t part = 0; part < p.parts; ++part) {
      *starts++ = static_cast<uint32_t>(count);
      count = V::append_events(to, count, codes, static_cast<int>(p.unit_channels(part)), list_base(p, x));
      codes += p.unit_channels(part);
    }
  *starts = static_cast<uint32_t>(count);
}

// Fills the last group of a list up with a row that adds nothing, the one after the chunk's `rows`.
template <class V>
size_t end_list(const EventPacking<V>& p, uint16_t* strip, size_t start, size_t count, size_t rows) {
  if (!V::kCarrySave || !p.nibbles) return count;
  for (size_t i = 0; i < kGroup; ++i) strip[count + i] = static_cast<uint16_t>(rows * kEventEntry);
  return start + round_up(count - start, kGroup);
}

// Appends the lists of one output pixel to the strip, chunk by chunk; returns the new length. Convolutions of one tap: no
// list is wanted twice, so they are made where they go.
template <class V>
size_t list_pixel(const Conv& c, const EventPacking<V>& p, const uint8_t* image, int y, int x, const EventLists<V>& lists,
                  uint32_t* positions, size_t count) {
  const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
  const uint8_t* codes = image + (inside ? (static_cast<size_t>(y) * c.width + x) * c.channels : 0);
  size_t start = count, row = 0;
  *positions++ = static_cast<uint32_t>(count);
  for (size_t part = 0; part < p.parts; ++part) {
    if (part > 0 && part % p.per_chunk == 0) {
      count = end_list<V>(p, lists.strip, start, count, row);
      *positions++ = static_cast<uint32_t>(start = count);
      row = 0;
    }
    const uint16_t first = static_cast<uint16_t>(row * kEventEntry);
    const size_t channels = p.unit_channels(part), before = count;
    uint16_t* to = lists.strip + count;
    if (inside) {
      count = V::append_events(lists.strip, count, codes + part * p.part, static_cast<int>(channels), 0);
      if (first > 0) V::copy_events(to, to, count - before, first);
    } else {
      count += lists.pads[part + 1] - lists.pads[part];
      V::copy_events(to, lists.pad + lists.pads[part], count - before, first);
    }
    row += channels;
  }
  count = end_list<V>(p, lists.strip, start, count, row);
  *positions = static_cast<uint32_t>(count);
  return count;
}

// The same for several taps that are one chunk, a row of taps at a time.
template <class V>
size_t list_taps(const Conv& c, const EventPacking<V>& p, int top, int left, const EventLists<V>& lists, uint32_t* positions,
                 size_t count) {
  uint16_t* const strip = lists.strip;
  const int right = left + c.kernel_w, x0 = left > 0 ? left : 0, x1 = right < c.width ? right : c.width;
  const size_t pads = lists.pads[1], start = count;
  const uint16_t* const pad = lists.pad;
  const uint16_t step = static_cast<uint16_t>(p.part * kEventEntry);
  uint16_t first = 0;  // of this row's taps
  positions[0] = static_cast<uint32_t>(count);
  for (int y = top; y < top + c.kernel_h; ++y) {
    const bool inside = y >= 0 && y < c.height && x0 < x1;
    if (inside) {
      const size_t slot = y % c.kernel_h;
      const uint32_t* starts = lists.starts + slot * (c.width + 1);
      const size_t n = starts[x1] - starts[x0];
      V::copy_events(strip + count, lists.rows + slot * lists.row + starts[x0], n,
                     static_cast<uint16_t>(first - list_base(p, left)));
      count += n;
    }
    for (int x = left; x < right; ++x, first = static_cast<uint16_t>(first + step))
      if (pads > 0 && !(inside && x >= x0 && x < x1)) V::copy_events(strip + count, pad, pads, first), count += pads;
  }
  count = end_list<V>(p, strip, start, count, p.rows);
  positions[1] = static_cast<uint32_t>(count);
  return count;
}

// The same for any taps.
template <class V>
size_t list_window(const Conv& c, const EventPacking<V>& p, int top, int left, const EventLists<V>& lists,
                   uint32_t* positions, size_t count) {
  // Copies, for the compiler to know that no list it writes changes them.
  const int width = c.width, kernel_w = c.kernel_w;
  const size_t parts = p.parts, per_chunk = p.per_chunk, part = p.part;
  uint16_t* const strip = lists.strip;
  const uint32_t* const pads = lists.pads;
  const uint16_t* const pad = lists.pad;
  size_t in_chunk = 0, row = 0, start = count;  // units of this chunk so far, their rows
  *positions++ = static_cast<uint32_t>(count);
  for (int y = top; y < top + c.kernel_h; ++y) {
    const bool inside = y >= 0 && y < c.height;
    const size_t slot = inside ? y % c.kernel_h : 0;
    const uint32_t* starts = lists.starts + slot * (width * parts + 1);
    const uint16_t* listed = lists.rows + slot * lists.row;
    for (int x = left; x < left + kernel_w; ++x) {
      const bool here = inside && x >= 0 && x < width;
      const uint32_t* at = here ? starts + x * parts : pads;
      const uint16_t* from = here ? listed : pad;
      for (size_t i = 0; i < parts; ++i) {
        if (in_chunk++ == per_chunk) {
          count = end_list<V>(p, strip, start, count, row);
          *positions++ = static_cast<uint32_t>(start = count);
          in_chunk = 1, row = 0;
        }
        const size_t n = at[i + 1] - at[i];
        V::copy_events(strip + count, from + at[i], n,
                       static_cast<uint16_t>(row * kEventEntry - (here ? list_base(p, x) : 0)));
        count += n;
        row += parts == 1 ? part : p.unit_channels(i);
      }
    }
  }
  count = end_list<V>(p, strip, start, count, row);
  *positions = static_cast<uint32_t>(count);
  return count;
}

template <class V, class Finish>
void events_rows(const Conv& c, const EventPacking<V>& p, const void* image, int row0, int row1, const Finish& write,
                 void* scratch) {
  const EventLists<V> lists(c, p, scratch);
  const typename V::Scale scale(c.shift);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  for (size_t part = 0, count = 0; part <= p.parts; ++part) {
    lists.pads[part] = static_cast<uint32_t>(count);
    if (part == p.parts) break;
    for (size_t i = 0; i < p.unit_channels(part); ++i)
      for (int n = 0; n < c.pad_value[part * p.part + i]; ++n) lists.pad[count++] = static_cast<uint16_t>(i * kEventEntry);
  }
  // Rows are read in no order that a processor would foresee.
  for (size_t at = 0; at < p.weights; at += 64) V::prefetch(p.weight + at);
  int oy = row0, ox = 0;
  int listed = 0;  // rows before this one have been listed, as far as they are needed
  const size_t all = static_cast<size_t>(row1 - row0) * c.out_width;
  for (size_t pixel = 0; pixel < all;) {
    const size_t first = pixel;
    size_t count = 0;
    for (; pixel < all && pixel - first < kStripPixels && (pixel == first || count + lists.window <= lists.capacity); ++pixel) {
      if (ox == c.out_width) ox = 0, ++oy;
      const int top = oy * c.stride_h - c.pad_h, left = ox * c.stride_w - c.pad_w;
      uint32_t* positions = lists.positions + (pixel - first) * p.chunks;
      if (p.units == p.parts) {
        count = list_pixel<V>(c, p, codes, top, left, lists, positions, count);
      } else {
        if (listed < top) listed = top;
        for (; listed < top + c.kernel_h && listed < c.height; ++listed) list_row<V>(c, p, codes, listed, lists);
        count = (p.chunks == 1 && p.parts == 1 ? list_taps<V> : list_window<V>)(c, p, top, left, lists, positions, count);
      }
      ++ox;
    }
    const int8_t* weight = p.weight;
    const size_t pixels = pixel - first, y = first * c.outputs;
    for (size_t v = 0; v < p.vectors;) {
      const size_t n = p.block_vectors(v);
      const int o = static_cast<int>(v) * V::kBytes;
      if (p.nibbles) {
        if (V::kNibbleVectors >= 4 && n == 4) nibble_block<V, V::kNibbleVectors>(c, p, lists, pixels, weight, y, o, scale, write);
        else nibble_block<V, 2>(c, p, lists, pixels, weight, y, o, scale, write);
      } else {
        constexpr int kMost = V::kByteVectors;
        if (kMost >= 4 && n == 4) byte_block<V, kMost>(c, p, lists, pixels, weight, y, o, scale, write);
        else if (kMost >= 3 && n == 3) byte_block<V, kMost >= 3 ? 3 : 1>(c, p, lists, pixels, weight, y, o, scale, write);
        else if (kMost >= 2 && n == 2) byte_block<V, kMost >= 2 ? 2 : 1>(c, p, lists, pixels, weight, y, o, scale, write);
        else byte_block<V, 1>(c, p, lists, pixels, weight, y, o, scale, write);
      }
      weight += p.stored * p.row_bytes(n);
      v += n;
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
