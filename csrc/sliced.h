// Event-driven convolution with 1-bit weights: a row of weights is one bit an output, and rows are added up bit by bit.
//
// A weight is 2 bit - 1, so acc = 2 * (how many events of the window meet a set bit) - (how many events there are). Counts of
// all outputs of a vector are kept in *planes*: plane p holds bit p of every count. Carry-save adders put 64 rows
// at a time into the planes, with 2.1 logical instructions a row where three operands make one instruction, whatever a row is wide: 512
// outputs on AVX-512. The planes become numbers once a pixel (V::count_planes).
//
// Bound: a count is at most the number of events of its window, `most`, and there are planes for all of its bits, so nothing is
// carried out of the last one. most < 2^16 (supported), so 16 planes are enough, and the
// lists of four columns fit into a strip.
//
// Where one or two blocks of a quarter of a vector hold all outputs, the taps of a row of the window lie side by side in the
// four *lanes* of a vector: the events of an input column are added once for all taps, that is for neighbouring output
// pixels. After every column the first lane is a finished pixel, and the others move down.
#pragma once
#include "carry_save.h"

namespace bitspike {
namespace {

constexpr int kCountPlanes = 16;

// What lists are made for: whole windows, or their columns.
inline Conv listed_windows(const Conv& c, bool across) {
  Conv column = c;
  if (across) column.kernel_w = column.stride_w = 1;
  return column;
}

// Packed: per vector of outputs (or, across, per block of a lane) one row of bits per tap and channel, and a last one that
// adds nothing; then m and b, int32, rounded up to whole vectors.
template <class V>
struct SlicedPacking {
  static constexpr int kOutputs = 8 * V::kBytes, kLane = kOutputs / 4;
  bool across;
  Conv listed;
  EventUnits units;
  int block;  // outputs of a block
  size_t blocks, weights, numbers, bytes;
  uint8_t* weight;
  int32_t *m, *b;
  int* fits;

  SlicedPacking(const Conv& c, const void* packed)
      : across(sliced_across(c, kOutputs)), listed(listed_windows(c, across)), units(listed, kListedRows, false) {
    block = across ? kLane : kOutputs;
    blocks = (static_cast<size_t>(c.outputs) + block - 1) / block;
    weights = blocks * block_bytes();
    numbers = blocks * block;
    bytes = weights + 2 * numbers * sizeof(int32_t) + 64;
    char* p = static_cast<char*>(const_cast<void*>(packed));
    weight = reinterpret_cast<uint8_t*>(p);
    m = reinterpret_cast<int32_t*>(p + weights);
    b = m + numbers;
    fits = b + numbers;
  }
  size_t block_bytes() const { return (units.rows + 1) * V::kBytes; }
  size_t plane_bytes() const { return static_cast<size_t>(block) / 8; }  // of a finished pixel
};

template <class V>
bool sliced_supported(const Conv& c) {
  if (!may_support(Variant::sliced, c) || c.groups != 1) return false;
  const size_t rows = static_cast<size_t>(c.kernel_h) * c.kernel_w * c.channels;
  return rows <= kListedRows && rows * (c.hi > 0 ? c.hi : 1) < 65536 - 4 * kGroup;
}

template <class V>
size_t sliced_packed_bytes(const Conv& c) {
  return SlicedPacking<V>(c, nullptr).bytes;
}

template <class V>
void sliced_pack(const Conv& c, void* packed) {
  const SlicedPacking<V> p(c, packed);
  memset(packed, 0, p.bytes);
  const int8_t* w = c.weight;
  for (int o = 0; o < c.outputs; ++o) {
    uint8_t* block = p.weight + o / p.block * p.block_bytes();
    for (int ky = 0; ky < c.kernel_h; ++ky)
      for (int kx = 0; kx < c.kernel_w; ++kx) {
        // Across: the last tap of a row in the first lane.
        const int bit = o % p.block + (p.across ? (c.kernel_w - 1 - kx) * SlicedPacking<V>::kLane : 0);
        const int tap = p.across ? ky : ky * c.kernel_w + kx;
        uint8_t* to = block + static_cast<size_t>(tap) * c.channels * V::kBytes + bit / 8;
        for (int i = 0; i < c.channels; ++i, to += V::kBytes)
          *to = static_cast<uint8_t>(*to | (*w++ > 0 ? 1 << bit % 8 : 0));
      }
  }
  memcpy(p.m, c.m, c.outputs * sizeof(int32_t));
  memcpy(p.b, c.b, c.outputs * sizeof(int32_t));
  *p.fits = requant_fits(c);
}

// For the kernel's own use: the planes of a strip's finished pixels, and how many events the lists have.
template <class V>
size_t sliced_own_bytes(const SlicedPacking<V>& p) {
  return kStripPixels * (kCountPlanes * p.plane_bytes() + sizeof(int32_t)) + V::kBytes * 2;  // planes are read past the last one
}

template <class V>
size_t sliced_scratch_bytes(const Conv& c, int) {
  const SlicedPacking<V> p(c, nullptr);
  return EventLists(p.listed, p.units, sliced_own_bytes<V>(p), nullptr).bytes;
}

// 2^kPlanes rows into as many planes; returns what is carried.
template <class V, int kPlanes>
BITSPIKE_INLINE typename V::I32 add_rows(const uint8_t* weight, const uint16_t* list, typename V::I32* plane) {
  if constexpr (size_t{1} << kPlanes == kGroup) {
    return add_group<V, V::kBytes>(weight, list, plane);
  } else {
    constexpr int kHalf = kPlanes - 1;
    const typename V::I32 some = add_rows<V, kHalf>(weight, list, plane), more = add_rows<V, kHalf>(weight, list + (1 << kHalf), plane);
    typename V::I32 carry;
    plane[kHalf] = full_adder<V>(some, more, plane[kHalf], carry);
    return carry;
  }
}

// Adds a row of bits to the planes from `kFrom` on.
template <class V, int kPlanes, int kFrom>
BITSPIKE_INLINE void carry_on(typename V::I32* plane, typename V::I32 carry) {
  for (int p = kFrom; p < kPlanes; ++p) {
    const typename V::I32 next = V::and_(plane[p], carry);
    plane[p] = V::xor_(plane[p], carry);
    carry = next;
  }
}

// The rows of a list, whose length is a multiple of kGroup. What the last groups carry goes through the planes once for all of them.
template <class V, int kPlanes>
BITSPIKE_INLINE void add_list(const uint8_t* weight, const uint16_t* list, const uint16_t* end, typename V::I32* plane) {
  using I32 = typename V::I32;
  for (; end - list >= 64; list += 64) carry_on<V, kPlanes, 6>(plane, add_rows<V, 6>(weight, list, plane));
  I32 eights = V::zero(), sixteens = V::zero(), more = V::zero(), carry;
  if (end - list >= 32) more = add_rows<V, 5>(weight, list, plane), list += 32;
  if (end - list >= 16) sixteens = add_rows<V, 4>(weight, list, plane), list += 16;
  if (list < end) eights = add_rows<V, 3>(weight, list, plane);
  const I32 low = plane[3];
  plane[3] = V::xor_(low, eights);
  plane[4] = full_adder<V>(plane[4], sixteens, V::and_(low, eights), carry);
  plane[5] = full_adder<V>(plane[5], more, carry, more);
  carry_on<V, kPlanes, 6>(plane, more);
}

// The planes of a strip's finished pixels, lane by lane, for one block of outputs. Of the lists, the first kernel_w - 1 finish no pixel
// if kAcross.
template <class V, int kPlanes, bool kAcross>
void add_planes(const uint8_t* weight, const EventLists& lists, size_t count, size_t kernel_w, uint8_t* to) {
  constexpr size_t kLaneBytes = V::kBytes / 4;
  typename V::I32 plane[kPlanes];
  for (int p = 0; p < kPlanes; ++p) plane[p] = V::zero();
  for (size_t i = 0; i < count; ++i) {
    if (!kAcross)
      for (int p = 0; p < kPlanes; ++p) plane[p] = V::zero();
    add_list<V, kPlanes>(weight, lists.strip + lists.positions[i], lists.strip + lists.positions[i + 1], plane);
    if (!kAcross) {
      for (int p = 0; p < kPlanes; ++p) V::store_lanes(to + p * kLaneBytes, kPlanes * kLaneBytes, plane[p]);
      to += 4 * kPlanes * kLaneBytes;
      continue;
    }
    if (i + 1 >= kernel_w)
      for (int p = 0; p < kPlanes; ++p, to += kLaneBytes) V::store_first_lane(to, plane[p]);
    for (int p = 0; p < kPlanes; ++p) plane[p] = V::lanes_down(plane[p]);
  }
}

struct AddPlanes {
  int planes;
  void (*run)(const uint8_t* weight, const EventLists&, size_t count, size_t kernel_w, uint8_t* to);
};

// For counts up to `most`.
template <class V, bool kAcross, int kPlanes = 6>
AddPlanes add_planes_of(int32_t most) {
  if constexpr (kPlanes < kCountPlanes)
    if (most >= 1 << kPlanes) return add_planes_of<V, kAcross, kPlanes < 12 ? kPlanes + 1 : kCountPlanes>(most);
  return {kPlanes, add_planes<V, kPlanes, kAcross>};
}

// Outputs [first, last) of a strip's pixels; `events`: of a pixel's window.
template <class V, class Finish>
void finish_planes(const SlicedPacking<V>& p, const uint8_t* from, int planes, const int32_t* events, size_t pixels, int first,
                   int last, size_t y, size_t outputs, const typename V::Scale& scale, const Finish& write) {
  constexpr size_t kPlane = V::kBytes / 4;  // of a lane
  using One = Requantize<V, Finish>;
  for (int o = first; o < last; o += V::kBytes) {
    const int in_lane = (o - first) % SlicedPacking<V>::kLane, vectors = (at_most(last - o, V::kBytes) + V::kLanes - 1) / V::kLanes;
    const uint8_t* at = from + (o - first - in_lane) / 8 * static_cast<size_t>(planes) + in_lane / 8;
    const int32_t *m = p.m + o, *b = p.b + o;
    const auto outputs_at = [&](int v) { return One(write, o + v * V::kLanes, m + v * V::kLanes, b + v * V::kLanes); };
    const One requantize[4] = {outputs_at(0), outputs_at(1), outputs_at(2), outputs_at(3)};
    size_t to = y + o;
    for (size_t i = 0; i < pixels; ++i, at += planes * p.plane_bytes(), to += outputs) {
      if constexpr (Finish::kMade == Made::sums) {
        typename V::I32 pairs[2];
        V::template count_pairs<kPlane>(at, planes, pairs);
        V::store_sums(pairs, events[i], write.sums + to, at_most(last - o, V::kBytes));
        continue;
      }
      typename V::I32 count[4];
      V::template count_planes<kPlane>(at, planes, count);
      const typename V::I32 all = V::splat(events[i]);
      const auto some = [&](int v) {
        const int left = last - o - v * V::kLanes;
        write(to + v * V::kLanes, o + v * V::kLanes, at_most(left, V::kLanes),
              requantize[v](V::sub(V::add(count[v], count[v]), all), scale));
      };
      if (vectors == 4) some(0), some(1), some(2), some(3);
      else
        for (int v = 0; v < vectors; ++v) some(v);
    }
  }
}

// The lists of columns [x, end) of the windows whose first row is `top`, as long as they fit into the strip, and how many
// events each has; returns the number of lists. More than one row.
template <class V>
size_t list_columns(const SlicedPacking<V>& p, const uint8_t* codes, int top, int x, int end, size_t least,
                    const EventLists& lists, int& listed, int32_t* events) {
  const Conv& c = p.listed;
  if (listed < top) listed = top;
  for (; listed < top + c.kernel_h && listed < c.height; ++listed) list_row<V>(c, p.units, codes, listed, lists);
  uint16_t* const strip = lists.strip;
  const size_t window = lists.window, capacity = lists.capacity;
  const uint16_t step = static_cast<uint16_t>(c.channels * kEventEntry);
  size_t number = 0, count = 0;
  lists.positions[0] = 0;
  for (; x < end && number < kStripPixels && (number < least || count + window <= capacity); ++x) {
    const size_t start = count;
    const bool inside = x >= 0 && x < c.width;
    uint16_t first = static_cast<uint16_t>(inside ? 0 - list_base(p.units, x) : 0), row = 0;
    for (int y = top; y < top + c.kernel_h; ++y, row = static_cast<uint16_t>(row + step)) {
      if (inside && y >= 0 && y < c.height) {
        const size_t slot = y % c.kernel_h;
        const uint32_t* at = lists.starts + slot * (c.width + 1) + x;
        V::copy_events(strip + count, lists.rows + slot * lists.row + at[0], at[1] - at[0], static_cast<uint16_t>(first + row));
        count += at[1] - at[0];
      } else if (lists.pads[1] > 0) {
        V::copy_events(strip + count, lists.pad, lists.pads[1], row);
        count += lists.pads[1];
      }
    }
    events[number++] = static_cast<int32_t>(count - start);
    lists.positions[number] = static_cast<uint32_t>(count = fill_group(strip, start, count, p.units.rows));
  }
  return number;
}

template <class V, class Finish>
void sliced_rows(const Conv& c, const SlicedPacking<V>& p, const void* image, int row0, int row1, const Finish& write,
                 void* scratch) {
  const EventLists lists(p.listed, p.units, sliced_own_bytes<V>(p), scratch);
  int32_t* events = static_cast<int32_t*>(lists.other);
  uint8_t* planes = reinterpret_cast<uint8_t*>(events + kStripPixels);
  const typename V::Scale scale(c.shift);
  const uint8_t* codes = static_cast<const uint8_t*>(image);
  list_pads(p.listed, p.units, lists);
  if (row0 == 0)
    for (size_t at = 0; at < p.weights; at += 64) V::prefetch(p.weight + at);
  const size_t extra = p.across ? c.kernel_w - 1 : 0;  // lists that finish no pixel
  int listed = 0;
  for (int oy = row0, x0 = 0; oy < row1;) {
    // A strip: pixels from (oy, x0) on; of one row if `across`.
    const int top = oy * c.stride_h - c.pad_h, first_y = oy, first_x = x0;
    size_t number = 0, count = 0;
    const auto room = [&] { return number < kStripPixels && (number <= extra || count + lists.window <= lists.capacity); };
    const auto append = [&](int y, int x) {
      const size_t start = count;
      count = list_any<V>(p.listed, p.units, codes, y, x, lists, listed, lists.positions + number, count);
      events[number++] = static_cast<int32_t>(count - start);
      lists.positions[number] = static_cast<uint32_t>(count = fill_group(lists.strip, start, count, p.units.rows));
    };
    if (p.across) {
      const int left = x0 - c.pad_w, end = c.out_width - c.pad_w + static_cast<int>(extra);
      if (c.kernel_h > 1) number = list_columns<V>(p, codes, top, left, end, extra + 1, lists, listed, events);
      else
        for (int x = left; x < end && room(); ++x) append(top, x);
      x0 += static_cast<int>(number - extra);
      if (x0 == c.out_width) x0 = 0, ++oy;
    } else {
      while (oy < row1 && room()) {
        append(oy * c.stride_h - c.pad_h, x0 * c.stride_w - c.pad_w);
        if (++x0 == c.out_width) x0 = 0, ++oy;
      }
    }
    const size_t pixels = number - extra;
    int32_t most = 0;
    for (size_t i = 0; i < pixels; ++i) {
      for (size_t k = 1; k <= extra; ++k) events[i] += events[i + k];
      if (events[i] > most) most = events[i];
    }
    const AddPlanes add = p.across ? add_planes_of<V, true>(most) : add_planes_of<V, false>(most);
    const size_t y = (static_cast<size_t>(first_y - row0) * c.out_width + first_x) * c.outputs;
    for (size_t block = 0; block < p.blocks; ++block) {
      const int o = static_cast<int>(block) * p.block;
      add.run(p.weight + block * p.block_bytes(), lists, number, c.kernel_w, planes);
      finish_planes<V>(p, planes, add.planes, events, pixels, o, at_most(c.outputs, o + p.block), y, c.outputs, scale, write);
    }
  }
}

template <class V>
void conv_sliced(const Conv& c, const void* packed, const void* image, int row0, int row1, const Epilogue& e,
                 void* scratch) {
  const SlicedPacking<V> p(c, packed);
  with_finish<V>(e, c.outputs, *p.fits,
                 [&](const auto& write) { sliced_rows<V>(c, p, image, row0, row1, write, scratch); });
  count_nonzero<V>(e, static_cast<size_t>(row1 - row0) * c.out_width * c.outputs);
}

template <class V>
constexpr ConvKernel sliced_kernel() {
  return {sliced_supported<V>, sliced_packed_bytes<V>, sliced_pack<V>, sliced_scratch_bytes<V>, conv_sliced<V>};
}

}  // namespace
}  // namespace bitspike
