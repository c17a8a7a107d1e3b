// Lists of events: which rows of weights the codes of a window ask for, as often as they say. The ways to convolve that add rows
// up (events.h, sliced.h) walk along them.
//
// A list is made for a *strip* of output pixels at a time, so that a block of weights stays in the nearest cache for all of them. A
// *chunk* is as many rows of weights as that cache holds; a window has one list for each. Lists of the input's pixels are
// kept for the kernel_h rows that a window spans, and those of a window are put together from them.
#pragma once
#include "finish.h"

namespace bitspike {
namespace {

constexpr size_t kEventSlack = 64;         // entries that may be written past the end of a list
constexpr size_t kStripPixels = 48;        // and no more entries than ...
constexpr size_t kStripEntries = 1 << 16;  // ... unless one pixel has more
constexpr size_t kGroup = 8;               // rows that go through carry-save adders together
constexpr size_t kFew = 16;                // entries of a plane that are better listed twice than apart

// The rows of weights of a window, and how they are cut into chunks of at most `most` rows. A unit is the channels, or a
// part of them, of one tap. `grouped`: the last group of a list is filled up with a row that adds nothing, the one after
// the chunk's last. `planes`: where units are pixels and the window is one chunk, that may have a list for each bit of the codes, the
// highest first, in place of one that names a row as often as its code says.
struct EventUnits {
  size_t rows, part, parts, units, per_chunk, chunks, lists;
  int channels, planes;
  bool grouped;

  EventUnits(const Conv& c, size_t most, bool fill_groups, int bits = 1) : channels(c.channels), planes(bits), grouped(fill_groups) {
    const size_t taps = static_cast<size_t>(c.kernel_h) * c.kernel_w, all = c.channels;
    rows = taps * all;
    parts = (all + most - 1) / most;
    part = parts == 1 ? all : round_up((all + parts - 1) / parts, 64);
    parts = (all + part - 1) / part;
    units = taps * parts;
    per_chunk = most / part > 0 ? most / part : 1;
    chunks = (units + per_chunk - 1) / per_chunk;
    lists = chunks * planes;  // of a window
  }
  size_t unit_row(size_t unit) const { return unit / parts * channels + unit % parts * part; }
  size_t unit_channels(size_t unit) const {
    const size_t left = parts == 1 ? part : channels - unit % parts * part;
    return left < part ? left : part;
  }
  size_t chunk_row(size_t chunk) const { return chunk == chunks ? rows : unit_row(chunk * per_chunk); }
};

// In the scratch: lists of row numbers, times kEventEntry. A list of one pixel has at most channels * hi entries, or `channels` a plane.
struct EventLists {
  size_t pixel, row, window, capacity, bytes;
  uint32_t* starts;     // [planes][kernel_h][width * parts + 1], of `rows`
  uint32_t* positions;  // [kStripPixels * lists + 1], of `strip`
  uint32_t* pads;       // [planes][parts + 1], of `pad`
  void* other;          // `more` bytes for the kernel's own use, aligned to 64
  uint16_t *pad, *rows, *strip;  // rows: [planes][kernel_h][row]; pad: [planes][pixel + kEventSlack]

  EventLists(const Conv& c, const EventUnits& p, size_t more, void* scratch) {
    const bool ring = c.kernel_h * c.kernel_w > 1;
    const size_t planes = p.planes;
    pixel = static_cast<size_t>(c.channels) * (c.hi > 0 && planes == 1 ? c.hi : 1);
    row = ring ? c.width * pixel + kEventSlack : 0;
    window = c.kernel_h * c.kernel_w * pixel * planes + p.lists * kGroup + 2 * (planes - 1) * kFew;
    capacity = window > kStripEntries ? window : kStripEntries;
    char* at = static_cast<char*>(scratch);
    const auto take = [&](size_t size) {
      char* found = at;
      at += round_up(size, 64);
      return found;
    };
    other = take(more);
    starts = reinterpret_cast<uint32_t*>(take(ring ? planes * c.kernel_h * (c.width * p.parts + 1) * sizeof(uint32_t) : 0));
    positions = reinterpret_cast<uint32_t*>(take((kStripPixels * p.lists + 1) * sizeof(uint32_t)));
    pads = reinterpret_cast<uint32_t*>(take(planes * (p.parts + 1) * sizeof(uint32_t)));
    pad = reinterpret_cast<uint16_t*>(take(planes * (pixel + kEventSlack) * sizeof(uint16_t)));
    rows = reinterpret_cast<uint16_t*>(take(planes * c.kernel_h * row * sizeof(uint16_t)));
    strip = reinterpret_cast<uint16_t*>(take((capacity + kEventSlack) * sizeof(uint16_t)));
    bytes = static_cast<size_t>(at - static_cast<char*>(scratch));
  }
};

// What the lists of column x count from, modulo 2^16. Where units are whole pixels they run on from pixel to pixel, as rows of
// weights do from tap to tap: those of neighbours are then one list for a window, wherever that begins.
inline uint16_t list_base(const EventUnits& p, int x) {
  return p.parts == 1 ? static_cast<uint16_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(p.part) * kEventEntry) : 0;
}

// What codes ask for, or one bit of them if there are several planes.
template <class V>
size_t append_codes(const EventUnits& p, int plane, uint16_t* to, size_t count, const uint8_t* codes, size_t channels, uint16_t base) {
  if constexpr (V::kCarrySave)
    if (p.planes > 1) return V::append_plane(to, count, codes, static_cast<int>(channels), base, plane);
  return V::append_events(to, count, codes, static_cast<int>(channels), base);
}

// The lists of one row of the input's pixels.
template <class V>
void list_row(const Conv& c, const EventUnits& p, const uint8_t* image, int y, const EventLists& lists) {
  for (int plane = 0; plane < p.planes; ++plane) {
    const size_t slot = static_cast<size_t>(plane) * c.kernel_h + y % c.kernel_h;
    uint32_t* starts = lists.starts + slot * (c.width * p.parts + 1);
    uint16_t* to = lists.rows + slot * lists.row;
    const uint8_t* codes = image + static_cast<size_t>(y) * c.width * c.channels;
    size_t count = 0;
    for (int x = 0; x < c.width; ++x)
      for (size_t part = 0; part < p.parts; ++part) {
        *starts++ = static_cast<uint32_t>(count);
        count = append_codes<V>(p, plane, to, count, codes, p.unit_channels(part), list_base(p, x));
        codes += p.unit_channels(part);
      }
    *starts = static_cast<uint32_t>(count);
  }
}

// Fills the last group of a list up with row number `row`; returns its new end.
inline size_t fill_group(uint16_t* strip, size_t start, size_t count, size_t row) {
  for (size_t i = 0; i < kGroup; ++i) strip[count + i] = static_cast<uint16_t>(row * kEventEntry);
  return start + round_up(count - start, kGroup);
}

// After the last of a chunk's `rows`.
inline size_t end_list(const EventUnits& p, uint16_t* strip, size_t start, size_t count, size_t rows) {
  return p.grouped ? fill_group(strip, start, count, rows) : count;
}

// Appends the lists of one output pixel to the strip, chunk by chunk; returns the new length. Convolutions of one tap: no
// list is wanted twice, so they are made where they go.
template <class V>
size_t list_pixel(const Conv& c, const EventUnits& p, const uint8_t* image, int y, int x, const EventLists& lists,
                  uint32_t* positions, size_t count) {
  const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
  const uint8_t* codes = image + (inside ? (static_cast<size_t>(y) * c.width + x) * c.channels : 0);
  size_t start = count, row = 0;
  *positions++ = static_cast<uint32_t>(count);
  for (size_t part = 0; part < p.parts; ++part) {
    if (part > 0 && part % p.per_chunk == 0) {
      count = end_list(p, lists.strip, start, count, row);
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
  count = end_list(p, lists.strip, start, count, row);
  *positions = static_cast<uint32_t>(count);
  return count;
}

// A window's lists by bits, if it has several; append(plane, count) appends one. What is too short for a list of its own is put into
// the next one, twice.
template <class V, class Append>
size_t list_planes(const EventUnits& p, uint16_t* strip, uint32_t* positions, size_t count, Append append) {
  size_t start = count, few = 0;
  for (int plane = p.planes - 1; plane >= 0; --plane) {
    *positions++ = static_cast<uint32_t>(start);
    count = append(plane, count);
    if (few > 0) V::copy_events(strip + count, strip + start, few, 0), count += few;
    few = count - start;
    if (plane > 0 && few < kFew) continue;
    start = count = end_list(p, strip, start, count, p.rows);
    few = 0;
  }
  *positions = static_cast<uint32_t>(count);
  return count;
}

// One tap, which is one chunk.
template <class V>
size_t list_codes(const Conv& c, const EventUnits& p, const uint8_t* image, int y, int x, const EventLists& lists,
                  uint32_t* positions, size_t count) {
  const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
  const uint8_t* codes = image + (inside ? (static_cast<size_t>(y) * c.width + x) * c.channels : 0);
  return list_planes<V>(p, lists.strip, positions, count, [&](int plane, size_t n) {
    if (inside) return append_codes<V>(p, plane, lists.strip, n, codes, p.part, 0);
    const size_t pads = lists.pads[plane * (p.parts + 1) + 1];
    V::copy_events(lists.strip + n, lists.pad + plane * (lists.pixel + kEventSlack), pads, 0);
    return n + pads;
  });
}

// Several taps that are one chunk, a row of taps at a time.
template <class V>
size_t list_taps(const Conv& c, const EventUnits& p, int plane, int top, int left, const EventLists& lists, size_t count) {
  uint16_t* const strip = lists.strip;
  const int right = left + c.kernel_w, x0 = left > 0 ? left : 0, x1 = right < c.width ? right : c.width;
  const size_t pads = lists.pads[plane * (p.parts + 1) + 1];
  const uint16_t* const pad = lists.pad + plane * (lists.pixel + kEventSlack);
  const uint16_t step = static_cast<uint16_t>(p.part * kEventEntry);
  uint16_t first = 0;  // of this row's taps
  for (int y = top; y < top + c.kernel_h; ++y) {
    const bool inside = y >= 0 && y < c.height && x0 < x1;
    if (inside) {
      const size_t slot = static_cast<size_t>(plane) * c.kernel_h + y % c.kernel_h;
      const uint32_t* starts = lists.starts + slot * (c.width + 1);
      const size_t n = starts[x1] - starts[x0];
      V::copy_events(strip + count, lists.rows + slot * lists.row + starts[x0], n,
                     static_cast<uint16_t>(first - list_base(p, left)));
      count += n;
    }
    for (int x = left; x < right; ++x, first = static_cast<uint16_t>(first + step))
      if (pads > 0 && !(inside && x >= x0 && x < x1)) V::copy_events(strip + count, pad, pads, first), count += pads;
  }
  return count;
}

// The same for any taps.
template <class V>
size_t list_window(const Conv& c, const EventUnits& p, int top, int left, const EventLists& lists,
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
          count = end_list(p, strip, start, count, row);
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
  count = end_list(p, strip, start, count, row);
  *positions = static_cast<uint32_t>(count);
  return count;
}

// The list of a pixel outside the image.
inline void list_pads(const Conv& c, const EventUnits& p, const EventLists& lists) {
  for (int plane = 0; plane < p.planes; ++plane) {
    uint32_t* pads = lists.pads + plane * (p.parts + 1);
    uint16_t* pad = lists.pad + plane * (lists.pixel + kEventSlack);
    size_t count = 0;
    for (size_t part = 0; part < p.parts; ++part) {
      *pads++ = static_cast<uint32_t>(count);
      for (size_t i = 0; i < p.unit_channels(part); ++i) {
        const int code = c.pad_value[part * p.part + i];
        for (int n = p.planes > 1 ? code >> plane & 1 : code; n > 0; --n) pad[count++] = static_cast<uint16_t>(i * kEventEntry);
      }
    }
    *pads = static_cast<uint32_t>(count);
  }
}

// The list of the window whose first tap is (top, left), behind the `count` entries of the strip; `positions`: where its chunks
// or planes begin, and its end. Returns the new length. `listed`: rows before this one have been listed, as far as they are needed.
template <class V>
size_t list_any(const Conv& c, const EventUnits& p, const uint8_t* codes, int top, int left, const EventLists& lists,
                int& listed, uint32_t* positions, size_t count) {
  const bool one = p.chunks == 1 && p.parts == 1;
  if (p.units == p.parts) return (one ? list_codes<V> : list_pixel<V>)(c, p, codes, top, left, lists, positions, count);
  if (listed < top) listed = top;
  for (; listed < top + c.kernel_h && listed < c.height; ++listed) list_row<V>(c, p, codes, listed, lists);
  if (!one) return list_window<V>(c, p, top, left, lists, positions, count);
  return list_planes<V>(p, lists.strip, positions, count,
                        [&](int plane, size_t n) { return list_taps<V>(c, p, plane, top, left, lists, n); });
}

}  // namespace
}  // namespace bitspike
