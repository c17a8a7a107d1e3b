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
// leave one row of eights to unpack and add, where adding each row takes 5 instructions. Codes beyond 1 may then be listed bit by
// bit: after the rows of the highest bit, sums count twice as much, and those of the next bit are added. A code n is as many events
// as it has bits.
//
// Where a row of weights would leave most of a vector empty, neighbouring pixels have one list, for a window as wide as all of theirs:
// a row holds the weights of each of them, 0 where the tap is not its own (events_across).
//
// A strip of pixels (event_lists.h) runs through a block of outputs, chunk by chunk. Sums of a chunk of 8-bit weights wait in
// memory for the next one; rows of 4-bit weights, half as long and slower to add, gain nothing by chunks and are one.
#pragma once
#include "carry_save.h"

namespace bitspike {
namespace {

constexpr size_t kChunkRows = 576;  // of 8-bit weights, 64 bytes each: three quarters of a first-level cache

// Packed: per block of outputs one row of weights per tap and channel, and a last one that adds nothing; then m and b, int32,
// rounded up to whole vectors. Within a vector of bytes, byte 4 i + j is output j * kLanes + i, so that a flush gives outputs
// in their order.
template <class V>
struct EventPacking : EventUnits {
  Conv wide;  // of all pixels that have one list; what follows is its
  int across;
  bool nibbles;
  size_t stored;  // rows of a block
  size_t vectors, weights, bytes;
  int8_t* weight;
  int32_t *m, *b;
  int *budget, *fits;

  EventPacking(const Conv& c, const void* packed) : EventPacking(c, events_conv(c, V::kBytes, V::kCarrySave), packed) {}
  EventPacking(const Conv& c, const Conv& w, const void* packed) : EventPacking(c, w, packed, rows_of_nibbles(w, V::kBytes)) {}
  EventPacking(const Conv& c, const Conv& w, const void* packed, bool in_nibbles)
      : EventUnits(w, in_nibbles ? kListedRows : kChunkRows, in_nibbles && V::kCarrySave,
                   in_nibbles && V::kCarrySave && c.by_bits ? c.bit_planes() : 1),
        wide(w), across(w.outputs / c.outputs), nibbles(in_nibbles) {
    stored = rows + 1;
    vectors = round_up(w.outputs, nibbles ? 2 * V::kBytes : V::kBytes) / V::kBytes;
    weights = round_up(stored * vectors * (nibbles ? V::kBytes / 2 : V::kBytes), 64);
    bytes = weights + 2 * vectors * V::kBytes * sizeof(int32_t) + 64;
    char* p = static_cast<char*>(const_cast<void*>(packed));
    weight = reinterpret_cast<int8_t*>(p);
    m = reinterpret_cast<int32_t*>(p + weights);
    b = m + vectors * V::kBytes;
    budget = b + vectors * V::kBytes;
    fits = budget + 1;
  }
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
  const size_t row_of_taps = static_cast<size_t>(p.wide.kernel_w) * c.channels;
  for (size_t v = 0; v < p.vectors;) {
    const size_t n = p.block_vectors(v);
    const size_t row_bytes = p.row_bytes(n);
    for (size_t byte = 0; byte < n * V::kBytes; ++byte) {
      const size_t in_vector = byte % V::kBytes, vector = byte / V::kBytes;
      const size_t o = (v + vector) * V::kBytes + in_vector % 4 * V::kLanes + in_vector / 4;
      const size_t at = p.nibbles ? vector / 2 * V::kBytes + in_vector : byte;
      const int shift = p.nibbles && vector % 2 ? 4 : 0, add = p.nibbles ? 8 : 0;
      // The rows of tap (y, x) of this output's own pixel are those of the window's tap (y, left + x).
      const size_t pixel = o / c.outputs, left = pixel * c.stride_w * c.channels, own = static_cast<size_t>(c.kernel_w) * c.channels;
      const int8_t* w = o < static_cast<size_t>(p.wide.outputs) ? c.weight + o % c.outputs * c.kernel_h * own : nullptr;
      size_t column = 0;  // of rows that are one of taps
      for (size_t row = 0; row < p.stored; ++row) {
        const bool mine = w && row < p.rows && column >= left && column < left + own;
        const int value = (mine ? *w++ : 0) + add;
        int8_t& to = block[row * row_bytes + at];
        to = static_cast<int8_t>(static_cast<uint8_t>(to) | static_cast<uint8_t>(value) << shift);
        if (++column == row_of_taps) column = 0;
      }
    }
    block += p.stored * row_bytes;
    v += n;
  }
  for (int i = 0; i < p.across; ++i) {
    memcpy(p.m + i * c.outputs, c.m, c.outputs * sizeof(int32_t));
    memcpy(p.b + i * c.outputs, c.b, c.outputs * sizeof(int32_t));
  }
  const int up = c.weight_hi > 0 ? 127 / c.weight_hi : 127, down = c.weight_lo < 0 ? 128 / -c.weight_lo : 127;
  *p.fits = requant_fits(c);
  *p.budget = up < down ? up : down;
}

// Sums of a strip that wait for the next chunk.
template <class V>
size_t kept_bytes(const EventPacking<V>& p) {
  return p.chunks > 1 ? kStripPixels * (p.nibbles ? V::kNibbleVectors : V::kByteVectors) * V::kBytes * sizeof(int32_t) : 0;
}

template <class V>
size_t events_scratch_bytes(const Conv& c, int) {
  const EventPacking<V> p(c, nullptr);
  return EventLists(p.wide, p, kept_bytes<V>(p), nullptr).bytes;
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

// The same by carry-save adders (carry_save.h): sums[n][k] are 4-bit numbers worth 2^k each, eights are added up in bytes. Lists of all
// planes, the highest first, from positions[plane] to the next, their lengths multiples of kGroup.
template <class V, int N>
void add_nibble_groups(const int8_t* weight, const uint16_t* strip, const uint32_t* positions, int planes, typename V::I32* acc) {
  using I32 = typename V::I32;
  constexpr int kBudget = 255 / 15;
  uint32_t rows = 0;
  for (int i = 0; i < planes; ++i) rows = 2 * rows + (positions[i + 1] - positions[i]);
  const I32 start = V::splat(static_cast<int32_t>(0u - 8u * rows));
  for (int i = 0; i < 4 * N; ++i) acc[i] = start;
  I32 sums[N / 2][3], eights[N];
  for (int n = 0; n < N / 2; ++n) sums[n][0] = sums[n][1] = sums[n][2] = V::zero();
  for (int n = 0; n < N; ++n) eights[n] = V::zero();
  const auto half = [](I32 numbers, int n) { return V::low_nibbles(n % 2 ? V::shift_right_zero(numbers, 4) : numbers); };
  int groups = 0;
  for (int plane = planes - 1;; --plane, ++positions) {
    const int worth = 8 << plane;  // at most 64
    for (const uint16_t *list = strip + positions[0], *end = strip + positions[1]; list < end; list += kGroup) {
      for (int n = 0; n < N / 2; ++n) {
        const uint8_t* rows_at = reinterpret_cast<const uint8_t*>(weight) + n * V::kBytes;
        const I32 eight = add_group<V, N * V::kBytes / 2>(rows_at, list, sums[n]);
        for (int i = 2 * n; i < 2 * n + 2; ++i) eights[i] = V::add8(eights[i], half(eight, i));
      }
      if (++groups == kBudget) {
        for (int n = 0; n < N; ++n) V::flush8_unsigned(acc + 4 * n, eights[n], worth), eights[n] = V::zero();
        groups = 0;
      }
    }
    if (plane == 0) break;
    // One row of the list so far is two of the next, two are four, and four are its eights.
    for (int n = 0; n < N; ++n) V::flush8_unsigned(acc + 4 * n, eights[n], worth), eights[n] = half(sums[n / 2][2], n);
    for (int n = 0; n < N / 2; ++n) sums[n][2] = sums[n][1], sums[n][1] = sums[n][0], sums[n][0] = V::zero();
    groups = 1;
  }
  for (int n = 0; n < N; ++n) {
    const I32* own = sums[n / 2];
    const I32 fours = half(own[2], n), twos = V::add8(half(own[1], n), V::add8(fours, fours));
    V::flush8_unsigned(acc + 4 * n, V::add8(half(own[0], n), V::add8(twos, twos)));  // at most 7 * 15
    V::flush8_unsigned(acc + 4 * n, eights[n], 8);
  }
}

// The pixels that have one list, from one list to the next. kAcross: whether there may be several.
template <bool kAcross>
struct EventPixels {
  int across, channels, out_width;
  int x;     // of the first
  size_t y;  // where its outputs are

  int outputs() const { return kAcross ? at_most(out_width - x, across) * channels : channels; }  // of all of them
  int channel(int output) const { return kAcross ? output & (channels - 1) : output; }
  void next() {
    y += outputs();
    if (kAcross) x = x + across < out_width ? x + across : 0;
  }
};

// From the accumulators of one list to what the epilogue writes. It holds copies, for the compiler to know that no code that
// is stored changes them.
template <class V, int N, class Finish>
struct EventsFinish {
  const Finish write;
  const typename V::Scale scale;
  const int32_t *m, *b;
  const int o;

  template <class Pixels>
  void operator()(const typename V::I32* acc, const Pixels& pixels) const {
    const int outputs = pixels.outputs();
    const auto some = [&](int i, int lanes) {
      const int at = o + i * V::kLanes, channel = pixels.channel(at);
      const Requantize<V, Finish> requantize(write, channel, m + at, b + at);
      write(pixels.y + at, channel, lanes, requantize(acc[i], scale));
    };
    if (o + 4 * N * V::kLanes <= outputs) {  // nearly always, with a number that the compiler knows
      for (int i = 0; i < 4 * N; ++i) some(i, V::kLanes);
      return;
    }
    for (int i = 0; i < 4 * N && o + i * V::kLanes < outputs; ++i) some(i, at_most(outputs - o - i * V::kLanes, V::kLanes));
  }
};

// A block of outputs for all pixels of a strip, weights of 4 bits; they are in one chunk.
template <class V, int N, class Pixels, class Finish>
void nibble_block(const EventPacking<V>& p, const EventLists& lists, size_t number, const int8_t* weight, Pixels pixels, int o,
                  const typename V::Scale& scale, const Finish& write) {
  const EventsFinish<V, N, Finish> finish{write, scale, p.m, p.b, o};
  for (size_t i = 0; i < number; ++i, pixels.next()) {
    const uint32_t* positions = lists.positions + i * p.lists;
    typename V::I32 acc[4 * N];
    if constexpr (V::kCarrySave) add_nibble_groups<V, N>(weight, lists.strip, positions, p.planes, acc);
    else add_nibble_events<V, N>(weight, lists.strip + positions[0], positions[1] - positions[0], acc);
    finish(acc, pixels);
  }
}

// The same for weights of 8 bits, chunk by chunk.
template <class V, int N, class Pixels, class Finish>
void byte_block(const EventPacking<V>& p, const EventLists& lists, size_t number, const int8_t* weight, const Pixels& first, int o,
                const typename V::Scale& scale, const Finish& write) {
  const EventsFinish<V, N, Finish> finish{write, scale, p.m, p.b, o};
  for (size_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int8_t* w = weight + p.chunk_row(chunk) * p.row_bytes(N);
    const uint32_t* position = lists.positions + chunk;
    int32_t* kept = static_cast<int32_t*>(lists.other);
    Pixels pixels = first;
    for (size_t i = 0; i < number; ++i, position += p.chunks, kept += 4 * N * V::kLanes, pixels.next()) {
      typename V::I32 acc[4 * N];
      if (chunk == 0)
        for (int k = 0; k < 4 * N; ++k) acc[k] = V::zero();
      else
        for (int k = 0; k < 4 * N; ++k) acc[k] = V::load(kept + k * V::kLanes);
      add_events<V, N>(w, lists.strip + position[0], position[1] - position[0], *p.budget, acc);
      if (chunk + 1 == p.chunks) finish(acc, pixels);
      else
        for (int k = 0; k < 4 * N; ++k) V::store(kept + k * V::kLanes, acc[k], V::kLanes);
    }
  }
}

template <class V, bool kAcross, class Finish>
void events_rows(const EventPacking<V>& p, const void* image, int row0, int row1, EventPixels<kAcross> pixels, const Finish& write,
                 void* scratch) {
  const Conv& c = p.wide;
  const EventLists lists(c, p, kept_bytes<V>(p), scratch);
  const typename V::Scale scale(c.shift);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  list_pads(c, p, lists);
  // Rows are read in no order that a processor would foresee.
  for (size_t at = 0; at < p.weights; at += 64) V::prefetch(p.weight + at);
  int oy = row0, ox = 0;
  int listed = 0;
  const size_t all = static_cast<size_t>(row1 - row0) * c.out_width;
  for (size_t pixel = 0; pixel < all;) {
    const size_t first = pixel;
    size_t count = 0;
    for (; pixel < all && pixel - first < kStripPixels && (pixel == first || count + lists.window <= lists.capacity); ++pixel) {
      if (ox == c.out_width) ox = 0, ++oy;
      const int top = oy * c.stride_h - c.pad_h, left = ox * c.stride_w - c.pad_w;
      count = list_any<V>(c, p, codes, top, left, lists, listed, lists.positions + (pixel - first) * p.lists, count);
      ++ox;
    }
    const int8_t* weight = p.weight;
    const size_t number = pixel - first;
    for (size_t v = 0; v < p.vectors;) {
      const size_t n = p.block_vectors(v);
      const int o = static_cast<int>(v) * V::kBytes;
      if constexpr (kAcross) {  // as many as one vector holds, or two of 4 bits
        if (p.nibbles) nibble_block<V, 2>(p, lists, number, weight, pixels, o, scale, write);
        else byte_block<V, 1>(p, lists, number, weight, pixels, o, scale, write);
      } else if (p.nibbles) {
        if (V::kNibbleVectors >= 4 && n == 4) nibble_block<V, V::kNibbleVectors>(p, lists, number, weight, pixels, o, scale, write);
        else nibble_block<V, 2>(p, lists, number, weight, pixels, o, scale, write);
      } else {
        constexpr int kMost = V::kByteVectors;
        if (kMost >= 4 && n == 4) byte_block<V, kMost>(p, lists, number, weight, pixels, o, scale, write);
        else if (kMost >= 3 && n == 3) byte_block<V, kMost >= 3 ? 3 : 1>(p, lists, number, weight, pixels, o, scale, write);
        else if (kMost >= 2 && n == 2) byte_block<V, kMost >= 2 ? 2 : 1>(p, lists, number, weight, pixels, o, scale, write);
        else byte_block<V, 1>(p, lists, number, weight, pixels, o, scale, write);
      }
      weight += p.stored * p.row_bytes(n);
      v += n;
    }
    for (size_t i = 0; i < number; ++i) pixels.next();
  }
}

template <class V>
void conv_events(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                 void* scratch) {
  const EventPacking<V> p(c, packed);
  with_finish<V>(e, c.outputs, *p.fits,
                 [&](const auto& write) {
                   if (p.across > 1)
                     events_rows<V>(p, image, row0, row1, EventPixels<true>{p.across, c.outputs, c.out_width, 0, 0}, write, scratch);
                   else
                     events_rows<V>(p, image, row0, row1, EventPixels<false>{1, c.outputs, c.out_width, 0, 0}, write, scratch);
                 });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

}  // namespace
}  // namespace bitspike
