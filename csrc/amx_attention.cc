// q (k^T v) by a matrix unit (see amx.cc): two products of numbers >= 0, by `tdpbuud`. In both, what is left of the product lies in tiles of
// 16 rows of 64 bytes, and what is right of it in tiles of [64 / 4][16 columns][4]; k has to be transposed for that.
//
// k^T v does not fit into bytes, q usually needs few bits of its own: with codes q < 2^(8 - e), k^T v = low + 2^e high and low < 2^e, high < 2^8,
// q (k^T v) = q low + (2^e q) high is one product of bytes, twice as deep. That is a *pass*: it is good for 8 + e bits of k^T v, 13 with codes
// up to 4. As many as it takes are added up, modulo 2^32, since the true sum is below 2^31.
#include "amx.h"
#include "tiles.h"

namespace bitspike {
namespace {

constexpr int kMostPasses = 4;
constexpr int kBlock = kRows * 2 * kRows;  // sums of two tiles

// Scratch, in bytes.
struct MatrixAttention {
  size_t tiles, width;         // of 16 channels of a head; channels in whole tiles
  size_t token_steps;          // of 64 tokens
  size_t groups, half, steps;  // of 4 channels of a head; where in a row of q 2^e q begins; of 64 bytes of such a row
  size_t values, kv, right, sums, rows, all;  // where each begins; k^T comes first, and later rows of q in its place

  explicit MatrixAttention(const Attention& a) {
    const size_t d = a.head_channels, tokens = a.tokens;
    tiles = (d + kRows - 1) / kRows, width = tiles * kRows;
    token_steps = (tokens + kDepth - 1) / kDepth;
    groups = (d + 3) / 4, half = d <= 32 ? 32 : round_up(d, kDepth), steps = 2 * half / kDepth;
    values = tiles * token_steps * kTile;
    const size_t queries = 2 * kRows * row_bytes();
    kv = 2 * values > queries ? 2 * values : queries;
    right = kv + width * width * sizeof(int32_t);
    sums = right + kMostPasses * tiles * steps * kTile;
    rows = sums + 2 * kMostPasses * kBlock * sizeof(int32_t);
    all = rows + 2 * kDepth * round_up(width, 64);
  }
  size_t row_bytes() const { return steps * kDepth; }
};

// Few tokens or channels leave most of a tile empty. With as many, only the last token may lie less than 16 bytes before the end of an image.
bool worth_tiles(const Attention& a) { return a.tokens >= 2 * kRows && a.head_channels >= kRows; }

BITSPIKE_INLINE __m512i load_codes(const uint8_t* p, size_t c, size_t channels) {
  return _mm512_maskz_loadu_epi8(channels - c >= 64 ? ~uint64_t{0} : (uint64_t{1} << (channels - c)) - 1, p + c);
}

// Tokens of k or v, from some channel on. Behind the last channel may lie anything: it makes sums that nobody reads.
struct Tokens {
  const uint8_t* from;
  size_t step;
  BITSPIKE_INLINE const uint8_t* operator[](size_t i) const { return from + i * step; }
};

BITSPIKE_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

BITSPIKE_INLINE __m512i four(const Tokens& x, size_t i, size_t apart) {
  __m512i v = _mm512_castsi128_si512(load16(x[i]));
  v = _mm512_inserti32x4(v, load16(x[i + apart]), 1);
  v = _mm512_inserti32x4(v, load16(x[i + 2 * apart]), 2);
  return _mm512_inserti32x4(v, load16(x[i + 3 * apart]), 3);
}

struct Whole {  // four tokens, 16 apart, to a vector
  using I = __m512i;
  BITSPIKE_INLINE static I load(const Tokens& x, size_t i) { return four(x, i, 16); }
  BITSPIKE_INLINE static I low(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  BITSPIKE_INLINE static I high(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  BITSPIKE_INLINE static __m512i row(I v) { return v; }
};

struct Few {  // one: there are only 16
  using I = __m128i;
  BITSPIKE_INLINE static I load(const Tokens& x, size_t i) { return load16(x[i]); }
  BITSPIKE_INLINE static I low(I a, I b) { return _mm_unpacklo_epi8(a, b); }
  BITSPIKE_INLINE static I high(I a, I b) { return _mm_unpackhi_epi8(a, b); }
  BITSPIKE_INLINE static __m512i row(I v) { return _mm512_zextsi128_si512(v); }
};

// 16 channels of 64 tokens as 16 rows: the bytes of a vector are interleaved with those of the vector 8 further on, four times.
template <class T>
BITSPIKE_INLINE void transpose(const Tokens& x, uint8_t* to) {
  typename T::I v[16], w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = T::load(x, i);
#pragma GCC unroll 4
  for (int level = 0; level < 4; ++level) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) w[2 * i] = T::low(v[i], v[i + 8]), w[2 * i + 1] = T::high(v[i], v[i + 8]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = w[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kDepth, T::row(v[i]));
}

// 16 channels of `count` tokens, four to a word.
struct Order {
  alignas(64) uint8_t from[64] = {};
  constexpr Order() {
    for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
  }
};
constexpr Order kFourToAWord;

BITSPIKE_INLINE void interleave(const Tokens& x, size_t count, uint8_t* to) {
  const __m512i order = _mm512_load_si512(kFourToAWord.from);
  for (size_t i = 0; i < count; i += 4) _mm512_store_si512(to + i * kRows, _mm512_permutexvar_epi8(order, four(x, i, 1)));
}

// The unit for tiles goes to sleep when no product of its was stored for some 2,000 cycles, and takes 1,000 to wake.
BITSPIKE_INLINE void stay_awake(uint8_t* anywhere) {
  memory_barrier();
  _tile_dpbuud(0, 4, 6);
  _tile_stored(0, anywhere, kDepth);
  memory_barrier();
}

// The last tokens, with channels in whole lines, and zeros to a number of rows.
Tokens copy_last(const uint8_t* from, size_t step, size_t count, size_t rows, size_t channels, uint8_t* to) {
  const size_t line = round_up(channels, 64);
  for (size_t c = 0; c < channels; c += 64) {
    size_t i = 0;
    for (; i < count; ++i) _mm512_store_si512(to + i * line + c, load_codes(from + i * step, c, channels));
    for (; i < rows; ++i) _mm512_store_si512(to + i * line + c, _mm512_setzero_si512());
  }
  return {to, line};
}

// k^T and v as tiles [channels / 16][tokens / 64].
BITSPIKE_NOINLINE void lay_out(const MatrixAttention& s, const Attention& a, const uint8_t* k, const uint8_t* v, uint8_t* keys, uint8_t* values,
                               uint8_t* rows) {
  const size_t step = a.channels, panel = s.token_steps * kTile, d = a.head_channels;
  const size_t last = (a.tokens - (d % kRows > 0)) / kDepth * kDepth, count = a.tokens - last;
  for (size_t n = 0; n < last; n += kDepth, keys += kTile, values += kTile) {
    stay_awake(rows);
    for (size_t t = 0; t < s.tiles; ++t) transpose<Whole>({k + n * step + t * kRows, step}, keys + t * panel);
    for (size_t t = 0; t < s.tiles; ++t) interleave({v + n * step + t * kRows, step}, kDepth, values + t * panel);
  }
  stay_awake(rows);
  if (!count) return;
  const size_t there = count > kRows ? kDepth : kRows;
  const Tokens x = copy_last(k + last * step, step, count, there, d, rows);
  const Tokens z = copy_last(v + last * step, step, count, round_up(count, 4), d, rows + there * x.step);
  for (size_t t = 0; t < s.tiles; ++t) {
    (count > kRows ? transpose<Whole> : transpose<Few>)({x.from + t * kRows, x.step}, keys + t * panel);
    interleave({z.from + t * kRows, z.step}, count, values + t * panel);
  }
}

// How to go through the left side of a product: bytes from row to row of a tile and from step to step, and steps.
struct Left {
  size_t row, step, steps;
};

// One or two tiles of rows, `other` bytes apart, times one or two of columns; sums are `next` bytes from row to row.
template <int kLeft, int kRight>
BITSPIKE_INLINE void products_square(const Left& o, const uint8_t* left, size_t other, const uint8_t* right, int32_t* sums, size_t next) {
  const uint8_t* right1 = right + o.steps * kTile;
  int32_t* const low = sums + kRows * next / sizeof(int32_t);
  _tile_zero(0);
  if (kRight > 1) _tile_zero(1);
  if (kLeft > 1) _tile_zero(2);
  if (kLeft > 1 && kRight > 1) _tile_zero(3);
  for (size_t k = o.steps; k > 0; --k, left += o.step, right += kTile, right1 += kTile) {
    _tile_loadd(6, right, kDepth);
    _tile_loadd(4, left, o.row);
    _tile_dpbuud(0, 4, 6);
    if (kRight > 1) {
      _tile_loadd(7, right1, kDepth);
      _tile_dpbuud(1, 4, 7);
    }
    if (kLeft > 1) {
      _tile_loadd(5, left + other, o.row);
      _tile_dpbuud(2, 5, 6);
      if (kRight > 1) _tile_dpbuud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, next);
  if (kRight > 1) _tile_stored(1, sums + kRows, next);
  if (kLeft > 1) _tile_stored(2, low, next);
  if (kLeft > 1 && kRight > 1) _tile_stored(3, low + kRows, next);
}

BITSPIKE_INLINE void products(const Left& o, const uint8_t* left, size_t other, int lefts, const uint8_t* right, int rights, int32_t* sums, size_t next) {
  if (lefts > 1 && rights > 1) products_square<2, 2>(o, left, other, right, sums, next);
  else if (lefts > 1) products_square<2, 1>(o, left, other, right, sums, next);
  else if (rights > 1) products_square<1, 2>(o, left, other, right, sums, next);
  else products_square<1, 1>(o, left, other, right, sums, next);
}

int two_or_one(size_t left) { return left > 1 ? 2 : 1; }

BITSPIKE_NOINLINE void keys_by_values(const MatrixAttention& s, const uint8_t* keys, const uint8_t* values, int32_t* kv) {
  const Left walk{kDepth, kTile, s.token_steps};
  const size_t panel = s.token_steps * kTile;
  memory_barrier();
  for (size_t i = 0; i < s.tiles; i += 2)
    for (size_t j = 0; j < s.tiles; j += 2)
      products(walk, keys + i * panel, panel, two_or_one(s.tiles - i), values + j * panel, two_or_one(s.tiles - j), kv + (i * s.width + j) * kRows,
               s.width * sizeof(int32_t));
  memory_barrier();
}

// `count` rows of q and 2^e q side by side. Returns the bits of q, in any byte. Where there are no channels, q is 0: whatever lies in a
// tile of k^T v does not matter there.
BITSPIKE_INLINE __m512i lay_out_queries(const MatrixAttention& s, const Attention& a, const uint8_t* q, int count, int spare, uint8_t* to) {
  const size_t d = a.head_channels, step = a.channels;
  const __m128i shift = _mm_cvtsi32_si128(spare);
  if (d <= 32) {
    const __mmask32 there = static_cast<__mmask32>(~0u >> (32 - d));
    __m256i any = _mm256_setzero_si256();
    for (int n = count; n > 0; --n, q += step, to += kDepth) {
      const __m256i codes = _mm256_maskz_loadu_epi8(there, q);
      any = _mm256_or_si256(any, codes);
      _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(codes), _mm256_sll_epi16(codes, shift), 1));
    }
    return _mm512_zextsi256_si512(any);
  }
  __m512i any = _mm512_setzero_si512();
  for (int n = count; n > 0; --n, q += step, to += 2 * s.half)
    for (size_t c = 0; c < d; c += 64) {
      const __m512i codes = load_codes(q, c, d);
      any = _mm512_or_si512(any, codes);
      _mm512_store_si512(to + c, codes);
      _mm512_store_si512(to + s.half + c, _mm512_sll_epi16(codes, shift));
    }
  return any;
}

// How many bits of a byte no code uses, up to 7.
int spare_bits(const Attention& a, const uint8_t* q) {
  const size_t d = a.head_channels;
  __m512i any = _mm512_setzero_si512();
  for (int n = a.tokens; n > 0; --n, q += a.channels)
    for (size_t c = 0; c < d; c += 64) any = _mm512_or_si512(any, load_codes(q, c, d));
  int spare = 7;
  while (_mm512_test_epi8_mask(any, _mm512_set1_epi8(static_cast<char>(256 - (256 >> spare))))) --spare;
  return spare;
}

uint32_t bits_of_sums(const int32_t* sums, size_t count) {
  __m512i any = _mm512_setzero_si512(), other = any;
  for (size_t i = 0; i < count; i += 64) {
    any = _mm512_ternarylogic_epi32(any, _mm512_load_si512(sums + i), _mm512_load_si512(sums + i + 16), 0xfe);
    other = _mm512_ternarylogic_epi32(other, _mm512_load_si512(sums + i + 32), _mm512_load_si512(sums + i + 48), 0xfe);
  }
  return static_cast<uint32_t>(_mm512_reduce_or_epi32(_mm512_or_si512(any, other)));
}

// The digits of a pass, from bit `first` of k^T v on: `spare` bits, and 8 more.
BITSPIKE_NOINLINE void lay_out_digits(const MatrixAttention& s, const int32_t* kv, int first, int spare, uint8_t* to) {
  const __m512i low_half = _mm512_set1_epi32(0xffff), even = _mm512_set1_epi32(0xff00ff), low = _mm512_set1_epi8(static_cast<char>((1 << spare) - 1));
  const __m128i begin = _mm_cvtsi32_si128(first), down = _mm_cvtsi32_si128(spare), up = _mm_cvtsi32_si128(8 - spare);
  for (size_t t = 0; t < s.tiles; ++t, to += s.steps * kTile) {
    const int32_t* from = kv + t * kRows;
    for (size_t g = 0; g < s.groups; ++g, from += 4 * s.width) {
      __m512i v[4];
      for (int i = 0; i < 4; ++i) v[i] = _mm512_load_si512(from + i * s.width);
      if (first)
        for (int i = 0; i < 4; ++i) v[i] = _mm512_srl_epi32(v[i], begin);
      // Two numbers to a word: those of channels 0 and 2, and of 1 and 3.
      const __m512i a = _mm512_ternarylogic_epi32(low_half, v[0], _mm512_slli_epi32(v[2], 16), 0xca);
      const __m512i b = _mm512_ternarylogic_epi32(low_half, v[1], _mm512_slli_epi32(v[3], 16), 0xca);
      const __m512i digit = _mm512_and_si512(_mm512_ternarylogic_epi32(even, a, _mm512_slli_epi32(b, 8), 0xca), low);
      const __m512i high = _mm512_ternarylogic_epi32(even, _mm512_srl_epi32(a, down), _mm512_sll_epi32(b, up), 0xca);
      _mm512_store_si512(to + g * kDepth, digit);
      _mm512_store_si512(to + (s.half / 4 + g) * kDepth, high);
    }
  }
}

// Sums to potentials, in the cheapest form that is exact. A factor is usually a power of two.
enum class Form { left, right, fits, any };

struct Potentials {
  Form form;
  __m128i shift;
  __m512i half;
  Avx512::Factor m;
  Avx512::Scale scale;

  // No sum is above `most`.
  Potentials(const Attention& a, uint64_t most) : m(int64_t{a.m}), scale(a.shift) {
    int64_t factor = a.m;
    int s = a.shift, power = 0;
    while (s > 0 && factor % 2 == 0) factor /= 2, --s;  // rshift(x * 2m, s + 1) = rshift(x * m, s)
    while (factor > 1 && factor % 2 == 0) factor /= 2, ++power;
    const uint64_t limit = INT32_MAX;
    if (most > limit) most = limit;
    const uint64_t size = static_cast<uint64_t>(a.m < 0 ? -int64_t{a.m} : a.m);
    half = _mm512_set1_epi32(s > 0 && s < 31 ? 1 << (s - 1) : 0);
    if (factor == 1 && s == 0 && power < 31 && most << power <= limit) form = Form::left, shift = _mm_cvtsi32_si128(power);
    else if (factor == 1 && power == 0 && s < 31 && most + (uint64_t{1} << s) <= limit) form = Form::right, shift = _mm_cvtsi32_si128(s);
    else form = ((most * size) >> a.shift) + 1 <= limit ? Form::fits : Form::any, shift = _mm_setzero_si128();
  }
  template <Form kForm>
  BITSPIKE_INLINE __m512i apply(__m512i sum) const {
    if (kForm == Form::left) return _mm512_sll_epi32(sum, shift);
    if (kForm == Form::right) return _mm512_sra_epi32(_mm512_add_epi32(sum, half), shift);
    if (kForm == Form::fits) return Avx512::requant_fits(sum, m, scale);
    return Avx512::requant(sum, m, Avx512::no_bias(), scale);
  }
};

// Sums of one or two tiles of columns that wait to be written, while the products of the next ones are made.
struct Waiting {
  const int32_t* sums;  // [passes][kBlock]
  int rows;
  int32_t* to;
  int channels;
};

template <Form kForm, bool kOnePass>
BITSPIKE_INLINE void write_sums(const Waiting& w, const Potentials& potentials, size_t step, int passes, int bits) {
  const auto potential = [&](const int32_t* sums) {
    __m512i sum = _mm512_load_si512(sums);
    if (!kOnePass)
      for (int p = 1; p < passes; ++p) sum = _mm512_add_epi32(sum, _mm512_sll_epi32(_mm512_load_si512(sums + p * kBlock), _mm_cvtsi32_si128(p * bits)));
    return potentials.apply<kForm>(sum);
  };
  const int32_t* sums = w.sums;
  int32_t* to = w.to;
  if (w.channels > kRows) {
    const __mmask16 there = Avx512::mask(w.channels - kRows);
    for (int n = w.rows; n > 0; --n, sums += 2 * kRows, to += step) {
      _mm512_storeu_si512(to, potential(sums));
      _mm512_mask_storeu_epi32(to + kRows, there, potential(sums + kRows));
    }
  } else {
    const __mmask16 there = Avx512::mask(w.channels);
    for (int n = w.rows; n > 0; --n, sums += 2 * kRows, to += step) _mm512_mask_storeu_epi32(to, there, potential(sums));
  }
}

// Returns whether every code q had as many bits to spare as it was said to have.
template <Form kForm, bool kOnePass>
BITSPIKE_NOINLINE bool queries_by_kv(const MatrixAttention& s, const Attention& a, const uint8_t* q, const uint8_t* right, int passes, int spare,
                                     const Potentials& shared, uint8_t* queries, int32_t* sums, int32_t* y) {
  const Potentials potentials = shared;
  const Left walk{s.row_bytes(), kDepth, s.steps};
  const size_t step = a.channels, panel = s.steps * kTile, pass = s.tiles * panel;
  const __m512i used = _mm512_set1_epi8(static_cast<char>(256 - (256 >> spare)));
  Waiting waiting{sums, 0, y, kRows};
  size_t turn = 0;
  __m512i any = lay_out_queries(s, a, q, at_most(kRows, a.tokens), spare, queries);
  for (int n = 0; n < a.tokens; n += kRows, q += kRows * step, y += kRows * step) {
    // Those of the next 16 tokens, for they are not to be read as tiles while they are still on their way to the cache.
    uint8_t *const these = queries + n / kRows % 2 * panel, *const others = queries + (n / kRows + 1) % 2 * panel;
    if (n + kRows < a.tokens) any = _mm512_or_si512(any, lay_out_queries(s, a, q + kRows * step, at_most(kRows, a.tokens - n - kRows), spare, others));
    if (_mm512_test_epi8_mask(any, used)) return false;
    for (size_t j = 0; j < s.tiles; j += 2) {
      int32_t* const to = sums + turn * kMostPasses * kBlock;
      memory_barrier();
      for (int p = 0; p < (kOnePass ? 1 : passes); ++p)
        products(walk, these, 0, 1, right + p * pass + j * panel, two_or_one(s.tiles - j), to + p * kBlock, 2 * kRows * sizeof(int32_t));
      memory_barrier();
      write_sums<kForm, kOnePass>(waiting, potentials, step, passes, 8 + spare);
      waiting = {to, at_most(kRows, a.tokens - n), y + j * kRows, at_most(2 * kRows, static_cast<int>(a.head_channels - j * kRows))};
      turn ^= 1;
    }
  }
  write_sums<kForm, kOnePass>(waiting, potentials, step, passes, 8 + spare);
  return true;
}

}  // namespace

size_t attention_scratch_bytes_amx(const Attention& a) {
  return worth_tiles(a) ? MatrixAttention(a).all : kernels_avx512.attention_scratch_bytes(a);
}

void attention_amx(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, int32_t* y, void* scratch) {
  if (!worth_tiles(a)) return kernels_avx512.attention(a, q, k, v, y, scratch);
  const MatrixAttention s(a);
  uint8_t *const base = static_cast<uint8_t*>(scratch), *const right = base + s.right;
  int32_t *const kv = reinterpret_cast<int32_t*>(base + s.kv), *const sums = reinterpret_cast<int32_t*>(base + s.sums);
  const TileConfig config(kDepth);
  memory_barrier();
  _tile_loadconfig(&config);
  lay_out(s, a, k, v, base, base + s.values, base + s.rows);
  keys_by_values(s, base, base + s.values, kv);
  const uint32_t any = bits_of_sums(kv, s.width * s.width);
  // Whether the codes q leave the bits to spare that make it one pass, and at least 4, turns out when they are read.
  int spare = any >> 15 ? spare_bits(a, q) : 4;
  while (spare < 7 && any >> (8 + spare) && !(any >> 15)) ++spare;
  for (;; spare = spare_bits(a, q)) {
    int passes = 0;
    do lay_out_digits(s, kv, passes * (8 + spare), spare, right + passes * s.tiles * s.steps * kTile);
    while (++passes * (8 + spare) < 32 && any >> passes * (8 + spare));
    const Potentials potentials(a, uint64_t{any} * (255u >> spare) * static_cast<uint64_t>(a.head_channels));
    const auto run = passes > 1                       ? queries_by_kv<Form::any, false>
                     : potentials.form == Form::left  ? queries_by_kv<Form::left, true>
                     : potentials.form == Form::right ? queries_by_kv<Form::right, true>
                     : potentials.form == Form::fits  ? queries_by_kv<Form::fits, true>
                                                      : queries_by_kv<Form::any, true>;
    if (run(s, a, q, right, passes, spare, potentials, base, sums, y)) break;
  }
  _tile_release();
}

}  // namespace bitspike
