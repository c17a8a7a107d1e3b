// A whole program, laid out once and run in one call: fused stages, one planned arena, tiles that stay in the cache.
//
// A *stage* is a producer (convolution, pooling, attention, mean) and the elementwise steps that follow it, done tile by
// tile: some rows of one image, or, where no step looks at neighbours (`flat`), some positions of any image. A value that
// only its own stage reads lives in a few rows of per-thread scratch (`Where::tile`), every other one in the arena.
//
// The arena of a group of G images is laid out for one image and multiplied: a value starts at G * offset and is
// [S, G, H, W, C] as everywhere. Offsets are multiples of 64. deploy/plan.py decides what is fused and what lies where.
//
// run() is safe from several threads: every call takes an arena of its own (kept for the next call). No number depends on
// threads, tiles, groups or variants.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "choice.h"
#include "kernels.h"
#include "memory.h"
#include "spiking.h"

namespace bitspike {

struct Value {
  enum class Where { pixels, arena, tile } where;
  Kind kind;
  int steps, height, width, channels;
  size_t offset;  // bytes per image (arena) or per position of a tile (tile)

  size_t positions() const { return static_cast<size_t>(height) * width; }
  size_t position_bytes() const { return channels * bytes_of(kind); }
};

// Positions [first, first + count) of one time step of a group, numbered [image, row, column]; rows [row0, row1) of
// `image` where the stage is not flat (heads, for attention).
struct Tile {
  size_t image;
  int row0, row1;
  size_t first, count;
};

// Some of the codes that a convolution read; bits: that are set.
struct Sample {
  size_t codes, sum, bits;
};

struct Scratch {  // of one thread
  Memory tile, kernel, residual;
  std::vector<size_t> nonzero;  // by value
  std::vector<Sample> sample;   // by convolution
};

struct Group {  // the images of one pass through the stages
  const uint8_t* pixels;
  size_t total, first, images;  // in `pixels`; the group's first; of the group
  char* arena;
  const std::vector<Variant>* variants;  // by convolution
  bool sampled;                          // whether codes are counted, and some of those that convolutions read are looked at
};

// A quantizer of an epilogue: where its codes go, and its numbers.
struct Codes {
  int value;
  std::vector<int32_t> m;
  int shift;
  int32_t lo, hi;
};

// What follows potentials x: y = x + residual, kept as `out`, quantized into codes[0] and codes[1]; -1 is none.
struct Finish {
  int residual = -1, out = -1;
  Scaled scaled{};  // of a residual of codes
  std::vector<Codes> codes;
  bool fits = false;  // x + residual cannot leave 32 bits; the plan finds out
};

class Plan {
 public:
  explicit Plan(const Kernels& kernels);
  ~Plan();
  Plan(const Plan&) = delete;

  int value(const Value&);
  // All steps up to the next stage() have outputs of this height and width. parts: units an image can be cut into; 0 for
  // flat. Returns its number.
  int stage(int height, int width, int parts);
  // The pointers of `conv` must stay valid as long as the plan; geometry is filled in here.
  void conv(int x, const Conv& conv, Finish);
  void finish(int x, Finish);
  void affine(int x, std::vector<int32_t> m, std::vector<int32_t> b, int shift, int y);
  void lookup(int x, const int8_t* table, int y);
  void lif(int x, const Lif&, int y);
  void lif_packed(int x, const PackedLif&, std::vector<int32_t> table, int y);
  void ielif(int x, const IeLif&, int y);
  void mean_time(int x, int32_t m, int y);
  void maxpool(int x, const Pool&, int y);
  void upsample(int x, bool bilinear, int factor, int y);
  void attention(int q, int k, int v, int heads, int32_t m, int shift, int y);
  void attention_map(int a, int b, bool over_channels, int heads, int32_t m, int shift, int y);
  // m: [steps or 1, heads]
  void attention_read(int chosen, int x, bool over_tokens, int heads, std::vector<int32_t> m, int shift, int y);
  void coincidences(int k, int v, int32_t m, int shift, int y);
  void add_codes(int a, int b, int y);
  void mask_codes(int q, int chosen, int y);
  void mean_space(int x, int32_t m, int y);
  // logits = float(output) * scale; arena_bytes: per image.
  void done(int output, float scale, size_t arena_bytes);

  // pixels: [S, images, H, W, C] of the pixels' value. seconds: nullptr, or a number per stage to add to; then the threads
  // share every image instead of having their own.
  void run(const uint8_t* pixels, size_t images, float* logits, int threads, double* seconds);
  // Stages [first, last) on all images at once, in memory of the caller: for programs with steps done elsewhere.
  void run_part(const uint8_t* pixels, size_t images, char* arena, int first, int last, int threads, double* seconds);

  const Value& at(int value) const { return values_[value]; }
  size_t arena_bytes() const { return arena_bytes_; }
  size_t packed_bytes() const;
  int stages() const { return static_cast<int>(stages_.size()); }

  struct Layer {  // a convolution, for reports and tuning
    int stage;
    Variant variant;                  // the one the next call takes
    std::array<bool, kVariants> able;
    bool summed;          // its one reader is a neuron that reads sums
    bool by_bits;         // its events, if that is the variant, are the bits of codes
    float density, load;  // of its input in the calls that looked: share that is not 0, mean code; negative: not known
  };
  std::vector<Layer> layers();
  void force(int layer, int variant);  // -1: choose by density again

 private:
  struct Stage;
  struct Layered;
  struct Workspace;
  struct Team;
  using Step = std::function<void(const Group&, const Tile&, size_t capacity, Scratch&)>;

  char* place(const Value&, const Group&, const Tile&, size_t capacity, Scratch&, int step) const;
  char* image(const Value&, const Group&, size_t image, int step) const;
  size_t stride(const Value&, const Group&, const Tile&, size_t capacity, Scratch&) const;
  void add(Step, std::initializer_list<int> operands);
  int64_t largest_residual(const Finish&) const;
  void bound(Finish&, int64_t largest);  // of the potentials x
  void look_ahead(Conv&, size_t layer, const std::vector<Variant>&) const;
  // summed: sums are written instead, and no residual is read.
  Epilogue epilogue(const Finish&, const Group&, const Tile&, size_t capacity, Scratch&, int step, bool summed = false) const;
  void run_tile(const Stage&, const Group&, size_t index, size_t tiles, size_t units, Scratch&) const;
  size_t tiles(const Stage&, size_t images, int threads) const;
  void run_group(const Group&, int first, int last, int threads, Workspace&, double* seconds) const;
  bool sample(int first);  // whether this call, of stages from one on, looks at codes
  std::unique_ptr<Workspace> take();
  void give(std::unique_ptr<Workspace>);
  void prepare(Workspace&, int threads) const;  // scratch for so many threads, with nothing counted yet
  std::vector<Variant> choose();
  void learn(const Workspace&, const Group&, int first, int last);
  void logits(const Group&, float* to) const;

  const Kernels& kernels_;
  std::vector<Value> values_;
  std::vector<std::unique_ptr<Stage>> stages_;
  std::vector<std::unique_ptr<Layered>> layers_;
  std::vector<int64_t> largest_;  // by value: what no potential is further from 0 than
  std::vector<int> mentioned_;  // by value: how often steps read or write it
  std::vector<std::function<void()>> neurons_;  // what `done` does for those that may read sums
  std::vector<int> counted_;  // by value: the stage that counts its codes that are not 0; -1: none
  int output_ = -1;
  float scale_ = 1;
  size_t arena_bytes_ = 0;
  std::mutex mutex_;  // of everything below, and of packing
  std::vector<std::unique_ptr<Workspace>> idle_;
  std::vector<float> density_;  // by value; -1: not known
  std::vector<unsigned> calls_;  // by the first stage that they did
  std::vector<Load> load_;      // by convolution
  bool called_ = false;         // and done, at least once
};

}  // namespace bitspike
