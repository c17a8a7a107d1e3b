#include "plan_parts.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <exception>
#include <new>
#include <optional>
#include <thread>

#include "pool.h"

namespace bitspike {
namespace {

constexpr size_t kTileBytes = 512 << 10;   // what a tile reads and writes: half of a second-level cache
constexpr size_t kGroupBytes = 512 << 10;  // arena of a group: images are taken together while they fit
constexpr size_t kMostImages = 64;         // in a group
constexpr size_t kPositions = 32;          // of a flat stage that stay together
constexpr size_t kFewPositions = 1024, kFewParts = 32;  // what a tile costs beside so few, as reading weights, is worth a thread's waiting
constexpr float kForget = 0.25f;           // share of the newest call in the moving density
constexpr unsigned kFirstCalls = 8, kCalls = 8;  // codes are looked at in the first calls, then in one of so many

size_t rounded(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A deterministic sample of codes: short runs, spread evenly, no two of them at the same channels for long.
// `counts`: there are others than 0 and 1.
void look(const char* codes, size_t count, bool counts, Sample& s) {
  constexpr size_t kRuns = 16, kRun = 64;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(codes);
  const size_t run = std::min(kRun, count);
  for (size_t i = 0; i < kRuns; ++i) {
    const size_t start = (count - run) * i / (kRuns - 1);
    uint32_t sum = 0, bits = 0;
    for (size_t j = 0; j < run; ++j) sum += from[start + j];
    for (size_t j = 0; counts && j < run; ++j) {
      const uint8_t code = from[start + j], pairs = code - (code >> 1 & 0x55), fours = (pairs & 0x33) + (pairs >> 2 & 0x33);
      bits += (fours + (fours >> 4)) & 15;
    }
    s.sum += sum, s.bits += counts ? bits : sum;
    s.codes += run;
  }
}

void blend(float& average, float found) { average = average < 0 ? found : (1 - kForget) * average + kForget * found; }

}  // namespace

struct Plan::Stage {
  int height, width, parts;  // parts: 0 for flat
  size_t unit_bytes = 0;     // read and written per part, or per position
  size_t local_bytes = 0;    // of scratch per position
  std::vector<Step> steps;
};

struct Plan::Workspace {
  Memory arena;
  std::deque<Scratch> scratch;  // by thread; may be more than the threads of this call
  std::vector<Variant> variants;
};

// The first exception of any thread (memory may run out), for the caller.
class Failure {
 public:
  template <class Work>
  void guard(Work work) {
    try {
      work();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

// What threads share while they work on one group: no thread waits for another one, only for tiles to be done.
struct Plan::Team {
  std::vector<std::atomic<size_t>> next, left;  // by stage
  Failure failure;
  explicit Team(size_t stages) : next(stages), left(stages) {}
};

Plan::Plan(const Kernels& kernels) : kernels_(kernels) {}
Plan::~Plan() = default;

int Plan::value(const Value& v) {
  values_.push_back(v);
  density_.push_back(-1);
  counted_.push_back(-1);
  mentioned_.push_back(0);
  largest_.push_back(int64_t{1} << 31);
  return static_cast<int>(values_.size()) - 1;
}

int Plan::stage(int height, int width, int parts) {
  stages_.push_back(std::make_unique<Stage>());
  stages_.back()->height = height, stages_.back()->width = width, stages_.back()->parts = parts;
  return stages() - 1;
}

void Plan::add(Step step, std::initializer_list<int> operands) {
  Stage& s = *stages_.back();
  s.steps.push_back(std::move(step));
  for (const int i : operands) {
    if (i < 0) continue;
    ++mentioned_[i];
    const Value& v = values_[i];
    const size_t bytes = v.steps * v.position_bytes();
    s.unit_bytes += s.parts ? bytes * v.positions() / s.parts : bytes;
    if (v.where == Value::Where::tile) s.local_bytes = std::max(s.local_bytes, v.offset + rounded(bytes, 64));
  }
}

char* Plan::image(const Value& v, const Group& g, size_t image, int step) const {
  const size_t t = v.steps == 1 ? 0 : step, bytes = v.positions() * v.position_bytes();
  if (v.where == Value::Where::pixels)
    return const_cast<char*>(reinterpret_cast<const char*>(g.pixels)) + (t * g.total + g.first + image) * bytes;
  return g.arena + v.offset * g.images + (t * g.images + image) * bytes;
}

char* Plan::place(const Value& v, const Group& g, const Tile& tile, size_t capacity, Scratch& s, int step) const {
  if (v.where != Value::Where::tile) return image(v, g, 0, step) + tile.first * v.position_bytes();
  const size_t t = v.steps == 1 ? 0 : step;
  return s.tile.get(0) + v.offset * capacity + t * capacity * v.position_bytes();
}

int64_t Plan::largest_residual(const Finish& f) const {
  if (f.residual < 0) return 0;
  const Value& r = values_[f.residual];
  if (r.kind != Kind::u8) return largest_[f.residual];
  return (f.scaled.hi * std::abs(int64_t{f.scaled.m}) >> f.scaled.shift) + 1 + std::abs(int64_t{f.scaled.b});
}

void Plan::bound(Finish& f, int64_t largest) {
  const int64_t all = largest + largest_residual(f);
  f.fits = all <= INT32_MAX;
  if (f.out >= 0) largest_[f.out] = std::min(all, int64_t{1} << 31);
}

Epilogue Plan::epilogue(const Finish& f, const Group& g, const Tile& tile, size_t capacity, Scratch& s, int step, bool summed) const {
  Epilogue e{};
  e.fits = f.fits;
  if (f.residual >= 0) {
    const Value& r = values_[f.residual];
    const char* from = place(r, g, tile, capacity, s, step);
    e.residual = reinterpret_cast<const int32_t*>(from);
    if (r.kind == Kind::u8) {
      const size_t count = tile.count * r.channels;
      int32_t* to = reinterpret_cast<int32_t*>(s.residual.get(count * sizeof(int32_t)));
      if (!summed) kernels_.affine(r.kind, from, 1, count, &f.scaled.m, &f.scaled.b, false, f.scaled.shift, to);
      e.residual = to;
    }
  }
  if (f.out >= 0) e.out = reinterpret_cast<int32_t*>(place(values_[f.out], g, tile, capacity, s, step));
  for (size_t i = 0; i < f.codes.size(); ++i) {
    const Codes& c = f.codes[i];
    e.quantizer[i] = {c.m.data(), c.m.size() > 1, c.shift, c.lo, c.hi};
    e.codes[i] = reinterpret_cast<uint8_t*>(place(values_[c.value], g, tile, capacity, s, step));
    e.nonzero[i] = g.sampled ? &s.nonzero[c.value] : nullptr;
  }
  return e;
}

// The weights of the next convolution by matrices: they are too many to stay in the caches from picture to picture.
void Plan::look_ahead(Conv& c, size_t layer, const std::vector<Variant>& variants) const {
  constexpr int kMatrix = static_cast<int>(Variant::matrix);
  for (size_t next = layer + 1; next < layers_.size(); ++next)
    if (variants[next] == Variant::matrix) {
      c.ahead = layers_[next]->packed[kMatrix].get(0), c.ahead_end = c.ahead + layers_[next]->packed[kMatrix].size();
      return;
    }
}

void Plan::conv(int x, const Conv& given, Finish f) {
  for (const Codes& c : f.codes) counted_[c.value] = stages() - 1;
  layers_.push_back(std::make_unique<Layered>());
  Layered& layer = *layers_.back();
  layer.conv = given;
  layer.stage = stages() - 1;
  layer.input = x;
  layer.residual = f.residual, layer.scaled = f.scaled;
  if (f.out >= 0 && f.codes.empty() && values_[f.out].where == Value::Where::tile) layer.out = f.out;
  const Stage& stage = *stages_.back();
  Conv& c = layer.conv;
  c.height = values_[x].height, c.width = values_[x].width;
  c.out_height = stage.height, c.out_width = stage.width;
  describe_weights(c);
  bound(f, c.largest);
  int count = 0;
  for (int v = 0; v < kVariants; ++v) count += layer.able[v] = bitspike::able(kernels_, c, static_cast<Variant>(v));
  layer.choice = count > 1;
  load_.emplace_back();
  const size_t index = layers_.size() - 1;
  const int steps = values_[x].steps;
  const bool flat = !stage.parts;
  if (kernels_.direct && f.residual < 0 && f.out < 0 && f.codes.size() == 1) layer.only = f.codes[0];
  const auto run = [this, &layer, index, x, f, steps, flat](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Variant variant = (*g.variants)[index];
    const ConvKernel& k = kernels_.conv[static_cast<int>(variant)];
    const void* packed = layer.packed[static_cast<int>(variant)].get(0);
    Conv c = layer.conv;
    c.by_bits = layer.by_bits.load(std::memory_order_relaxed);
    if (variant == Variant::matrix && tile.first == 0) look_ahead(c, index, *g.variants);
    if (flat) c.height = c.out_height = 1, c.width = c.out_width = static_cast<int>(tile.count);
    const int row0 = flat ? 0 : tile.row0, row1 = flat ? 1 : tile.row1;
    void* scratch = s.kernel.get(k.scratch_bytes(c, row1 - row0));
    const size_t unit = values_[x].position_bytes();  // codes are bytes
    const size_t read = flat ? tile.count * unit : static_cast<size_t>(row1 - row0) * c.stride_h * c.width * unit;
    const size_t skipped = flat ? 0 : static_cast<size_t>(row0) * c.stride_h * c.width * unit;
    for (int t = 0; t < steps; ++t) {
      const char* from = flat ? place(values_[x], g, tile, capacity, s, t) : image(values_[x], g, tile.image, t);
      const size_t all = values_[x].positions() * unit;  // with padding, the last rows may read none of it
      if (g.sampled && layer.choice && skipped < all) look(from + skipped, std::min(read, all - skipped), c.hi > 1, s.sample[index]);
      const bool summed = layer.sums.get();
      Epilogue e = epilogue(f, g, tile, capacity, s, t, summed);
      e.direct = layer.direct_ready.load(std::memory_order_acquire);
      if (summed) e.sums = reinterpret_cast<int16_t*>(e.out);
      k.run(c, packed, from, row0, row1, e, scratch);
    }
  };
  add(run, {x, f.residual, f.out, f.codes.size() > 0 ? f.codes[0].value : -1, f.codes.size() > 1 ? f.codes[1].value : -1});
}

void Plan::finish(int x, Finish f) {
  for (const Codes& c : f.codes) counted_[c.value] = stages() - 1;
  int steps = values_[x].steps;
  if (f.residual >= 0) steps = std::max(steps, values_[f.residual].steps);
  const size_t channels = values_[x].channels;
  bound(f, largest_[x]);
  const auto run = [this, x, f, steps, channels](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    for (int t = 0; t < steps; ++t)
      kernels_.finish(reinterpret_cast<int32_t*>(place(values_[x], g, tile, capacity, s, t)), tile.count, channels,
                      epilogue(f, g, tile, capacity, s, t));
  };
  add(run, {x, f.residual, f.out, f.codes.size() > 0 ? f.codes[0].value : -1, f.codes.size() > 1 ? f.codes[1].value : -1});
}

void Plan::done(int output, float scale, size_t arena_bytes) {
  output_ = output, scale_ = scale, arena_bytes_ = arena_bytes;
  for (const auto& prepare : neurons_) prepare();
  neurons_.clear();
}

// ------------------------------------------------------------------------------------------------------ running

// The units of work of a stage, cut into tiles that fit the cache, and enough of them for every thread.
size_t Plan::tiles(const Stage& s, size_t images, int threads) const {
  const size_t per_image = s.parts ? s.parts : static_cast<size_t>(s.height) * s.width * images;
  const size_t target = std::max<size_t>(kTileBytes / std::max<size_t>(s.unit_bytes, 1), s.parts ? 1 : 64);
  size_t tiles = (per_image + target - 1) / target;
  if (threads > 1) {
    // Two for every thread, so that one that is held up delays the others less; one where that is much of the work.
    const size_t wanted = per_image > (s.parts ? kFewParts : kFewPositions) ? 2 * threads : threads;
    const size_t share = s.parts ? (wanted + images - 1) / images : wanted;
    const size_t most = s.parts ? per_image : per_image / 16;  // not so small that starting one costs more than doing it
    tiles = std::max(tiles, std::min(share, std::max<size_t>(most, 1)));
  }
  return s.parts ? std::min(tiles, per_image) * images : tiles;
}

void Plan::run_tile(const Stage& s, const Group& g, size_t index, size_t tiles, size_t units, Scratch& scratch) const {
  Tile tile{};
  size_t capacity;
  if (s.parts) {
    const size_t each = tiles / g.images, part = index % each;
    tile.image = index / each;
    // Pairs of rows stay together where there are enough: winograd makes two at a time.
    const size_t unit = units < 4 * each ? 1 : 2;
    const auto row = [&](size_t p) { return static_cast<int>(p == each ? units : units * p / each / unit * unit); };
    tile.row0 = row(part), tile.row1 = row(part + 1);
    tile.first = (tile.image * s.height + tile.row0) * s.width;
    tile.count = static_cast<size_t>(tile.row1 - tile.row0) * s.width;
  } else {
    // Whole blocks of positions where there are enough: convolutions by matrices make so many at a time.
    const size_t unit = units < 2 * kPositions * tiles ? 1 : kPositions;
    const auto position = [&](size_t i) { return i == tiles ? units : units * i / tiles / unit * unit; };
    tile.first = position(index), tile.count = position(index + 1) - tile.first;
  }
  capacity = rounded(tile.count, 64);
  scratch.tile.get(capacity * s.local_bytes);
  for (const Step& step : s.steps) step(g, tile, capacity, scratch);
}

void Plan::run_group(const Group& g, int first, int last, int threads, Workspace& w, double* seconds) const {
  struct Size {
    size_t tiles, units;
  };
  const auto size = [&](int i) {
    const Stage& s = *stages_[i];
    return Size{tiles(s, g.images, threads), s.parts ? s.parts : static_cast<size_t>(s.height) * s.width * g.images};
  };
  if (threads <= 1) {
    double before = seconds ? now() : 0;
    for (int i = first; i < last; ++i) {
      const Size n = size(i);
      for (size_t tile = 0; tile < n.tiles; ++tile) run_tile(*stages_[i], g, tile, n.tiles, n.units, w.scratch[0]);
      if (seconds) {
        const double after = now();
        seconds[i] += after - before;
        before = after;
      }
    }
    return;
  }
  Team shared(stages_.size());
  for (int i = first; i < last; ++i) shared.left[i].store(size(i).tiles, std::memory_order_relaxed);
  team(threads, [&](int me) {
    double before = seconds && me == 0 ? now() : 0;
    for (int i = first; i < last; ++i) {
      const Size n = size(i);
      size_t finished = 0;
      for (size_t tile; (tile = shared.next[i].fetch_add(1, std::memory_order_relaxed)) < n.tiles; ++finished)
        shared.failure.guard([&] { run_tile(*stages_[i], g, tile, n.tiles, n.units, w.scratch[me]); });
      if (finished) shared.left[i].fetch_sub(finished, std::memory_order_acq_rel);
      for (int spins = 0; shared.left[i].load(std::memory_order_acquire) != 0; ++spins)
        if (spins > 4000) std::this_thread::yield();  // the others may be waiting for this core
      if (seconds && me == 0) {
        const double after = now();
        seconds[i] += after - before;
        before = after;
      }
    }
  });
  shared.failure.rethrow();
}

std::unique_ptr<Plan::Workspace> Plan::take() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Workspace> w = std::move(idle_.back());
      idle_.pop_back();
      return w;
    }
  }
  return std::make_unique<Workspace>();
}

void Plan::give(std::unique_ptr<Workspace> w) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(w));
}

void Plan::prepare(Workspace& w, int threads) const {
  w.scratch.resize(std::max<size_t>(w.scratch.size(), threads));
  for (Scratch& s : w.scratch) {
    s.nonzero.assign(values_.size(), 0);
    s.sample.assign(layers_.size(), Sample{});
  }
}

// The variant of every convolution for one call, its weights laid out. All variants give the same integers.
std::vector<Variant> Plan::choose() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Variant> variants;
  for (const std::unique_ptr<Layered>& layer : layers_) {
    const Conv& c = layer->conv;
    const Variant v = layer->forced >= 0 ? static_cast<Variant>(layer->forced)
                                         : cheapest(kernels_, c, layer->able, load_[variants.size()]);
    const int i = static_cast<int>(v);
    layer->by_bits.store(by_bits(kernels_, c, load_[variants.size()]), std::memory_order_relaxed);
    if (!layer->ready[i]) {
      kernels_.conv[i].pack(c, layer->packed[i].get(std::max<size_t>(kernels_.conv[i].packed_bytes(c), 1)));
      layer->ready[i] = true;
    }
    variants.push_back(v);
    // Not before the second call: that takes a while, and who wants one picture wants it soon.
    if (called_ && layer->only) {
      const Codes& q = *layer->only;
      layer->direct = DirectCodes(c, {q.m.data(), q.m.size() > 1, q.shift, q.lo, q.hi});
      layer->direct_ready.store(layer->direct.get(), std::memory_order_release);
      layer->only.reset();
    }
  }
  return variants;
}

bool Plan::sample(int first) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (calls_.empty()) calls_.resize(stages_.size());
  const unsigned call = calls_[first]++;
  return call < kFirstCalls || call % kCalls == 0;
}

// What the codes of stages [first, last) were like.
void Plan::learn(const Workspace& w, const Group& g, int first, int last) {
  std::lock_guard<std::mutex> lock(mutex_);
  called_ = true;
  if (!g.sampled) return;
  for (size_t i = 0; i < values_.size(); ++i) {
    if (counted_[i] < first || counted_[i] >= last) continue;
    const Value& v = values_[i];
    size_t nonzero = 0;
    for (const Scratch& s : w.scratch) nonzero += s.nonzero[i];
    blend(density_[i], float(nonzero) / (float(g.images) * v.steps * v.positions() * v.channels));
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    Sample all{};
    for (const Scratch& s : w.scratch) all.codes += s.sample[i].codes, all.sum += s.sample[i].sum, all.bits += s.sample[i].bits;
    if (!all.codes) continue;
    blend(load_[i].mean, float(all.sum) / all.codes), blend(load_[i].bits, float(all.bits) / all.codes);
  }
}

void Plan::logits(const Group& g, float* to) const {
  const size_t classes = values_[output_].channels;
  const int32_t* from = reinterpret_cast<const int32_t*>(image(values_[output_], g, 0, 0));
  for (size_t i = 0; i < g.images * classes; ++i) to[g.first * classes + i] = static_cast<float>(from[i]) * scale_;
}

void Plan::run(const uint8_t* pixels, size_t images, float* logits_to, int threads, double* seconds) {
  if (!images) return;
  const std::vector<Variant> variants = choose();
  const bool sampled = sample(0);
  const size_t cached = std::clamp<size_t>(kGroupBytes / std::max<size_t>(arena_bytes_, 1), 1, kMostImages);
  const int all = stages();
  size_t begun = 0;
  if (threads > 1 && images >= static_cast<size_t>(threads) && !seconds) {
    // As many images for every thread; what is left over is done by all threads together.
    const size_t share = images / threads, groups = (share + cached - 1) / cached * threads;
    begun = share * threads;
    Failure failure;
    const auto one = [&](size_t i) {
      const size_t first = begun * i / groups, count = begun * (i + 1) / groups - first;
      std::unique_ptr<Workspace> w = take();
      prepare(*w, 1);
      const Group g{pixels, images, first, count, w->arena.get(arena_bytes_ * count), &variants, sampled};
      run_group(g, 0, all, 1, *w, nullptr);
      logits(g, logits_to);
      learn(*w, g, 0, all);
      give(std::move(w));
    };
    parallel_for(groups, threads, [&](size_t i) { failure.guard([&] { one(i); }); });
    failure.rethrow();
  }
  if (begun == images) return;
  std::unique_ptr<Workspace> w = take();
  const size_t left = images - begun, groups = (left + cached - 1) / cached, most = (left + groups - 1) / groups;
  for (size_t i = 0; i < groups; ++i) {
    prepare(*w, threads);
    const size_t first = begun + left * i / groups, count = begun + left * (i + 1) / groups - first;
    const Group g{pixels, images, first, count, w->arena.get(arena_bytes_ * most), &variants, sampled};
    run_group(g, 0, all, threads, *w, seconds);
    logits(g, logits_to);
    learn(*w, g, 0, all);
  }
  give(std::move(w));
}

void Plan::run_part(const uint8_t* pixels, size_t images, char* arena, int first, int last, int threads, double* seconds) {
  const std::vector<Variant> variants = choose();
  std::unique_ptr<Workspace> w = take();
  prepare(*w, threads);
  const Group g{pixels, images, 0, images, arena, &variants, sample(first)};
  run_group(g, first, last, threads, *w, seconds);
  learn(*w, g, first, last);
  give(std::move(w));
}

// ---------------------------------------------------------------------------------------------------- reporting

size_t Plan::packed_bytes() const {
  size_t bytes = 0;
  for (const std::unique_ptr<Layered>& layer : layers_)
    for (const Memory& m : layer->packed) bytes += m.size();
  return bytes;
}

std::vector<Plan::Layer> Plan::layers() {
  const std::vector<Variant> variants = choose();
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Layer> layers;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layered& l = *layers_[i];
    // Neurons over time do not count their spikes; of codes that are 0 or 1 the share is their mean.
    const float counted = density_[l.input], density = counted < 0 && l.conv.hi == 1 ? load_[i].mean : counted;
    layers.push_back({l.stage, variants[i], l.able, l.sums.get() != nullptr, l.by_bits, density, load_[i].mean});
  }
  return layers;
}

void Plan::force(int layer, int variant) {
  std::lock_guard<std::mutex> lock(mutex_);
  layers_[layer]->forced = variant;
}

}  // namespace bitspike
