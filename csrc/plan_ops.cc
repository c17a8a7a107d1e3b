// The steps of a plan that are no convolution: which kernel does each, on which part of its operands. (`upsample`: upsample.cc.)
#include "plan_parts.h"

namespace bitspike {

// Elements from one time step of an operand to the next; 0 for one step that all share.
size_t Plan::stride(const Value& v, const Group& g, const Tile& tile, size_t capacity, Scratch& s) const {
  if (v.steps == 1) return 0;
  return static_cast<size_t>(place(v, g, tile, capacity, s, 1) - place(v, g, tile, capacity, s, 0)) / bytes_of(v.kind);
}

void Plan::affine(int x, std::vector<int32_t> m, std::vector<int32_t> b, int shift, int y) {
  const auto run = [this, x, m, b, shift, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const size_t channels = values_[x].channels;
    const bool each = m.size() > 1;
    for (int t = 0; t < values_[x].steps; ++t)
      kernels_.affine(values_[x].kind, place(values_[x], g, tile, capacity, s, t), each ? tile.count : 1,
                      each ? channels : channels * tile.count, m.data(), b.data(), each, shift,
                      reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, t)));
  };
  add(run, {x, y});
}

void Plan::lookup(int x, const int8_t* table, int y) {
  const auto run = [this, x, table, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    for (int t = 0; t < values_[x].steps; ++t)
      kernels_.lookup(reinterpret_cast<uint8_t*>(place(values_[x], g, tile, capacity, s, t)), tile.count,
                      values_[x].channels, table, reinterpret_cast<int8_t*>(place(values_[y], g, tile, capacity, s, t)));
  };
  add(run, {x, y});
}

void Plan::lif(int x, const Lif& p, int y) { lif_packed(x, {p, p.threshold, nullptr, 0, nullptr}, {}, y); }

void Plan::ielif(int x, const IeLif& p, int y) {
  const auto run = [this, x, y, p](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value &vx = values_[x], &vy = values_[y];
    const char* from = place(vx, g, tile, capacity, s, 0);
    char* to = place(vy, g, tile, capacity, s, 0);
    kernels_.ielif(p, reinterpret_cast<const int32_t*>(from), tile.count * vx.channels,
                   stride(vx, g, tile, capacity, s), reinterpret_cast<uint8_t*>(to),
                   stride(vy, g, tile, capacity, s));
  };
  add(run, {x, y});
}

void Plan::lif_packed(int x, const PackedLif& given, std::vector<int32_t> table, int y) {
  struct Kept {
    std::vector<int32_t> table;
    std::vector<uint32_t> words;
    Buckets buckets;
    PackedLif p;
    LifOfSums alone;  // potentials
  };
  const auto kept = std::make_shared<Kept>(Kept{std::move(table), {}, {}, given, {}});
  PackedLif& p = kept->p;
  p.table = kept->table.empty() ? nullptr : kept->table.data(), p.entries = static_cast<int>(kept->table.size());
  kept->words.resize(make_buckets(p.table, p.entries, nullptr, nullptr));
  p.buckets = make_buckets(p.table, p.entries, kept->words.empty() ? nullptr : kept->words.data(), &kept->buckets)
                  ? &kept->buckets
                  : nullptr;
  // The convolution that made the potentials, and its sums if nobody else wants the potentials: that is not known before `done`.
  Layered* made = layers_.empty() || layers_.back()->stage != stages() - 1 || layers_.back()->out != x ? nullptr : layers_.back().get();
  if (kernels_.lif_sums)
    neurons_.push_back([this, made, kept, x] {
      if (made && mentioned_[x] == 2) {
        const bool codes = made->residual >= 0 && values_[made->residual].kind == Kind::u8;
        made->sums = LifOfSums(made->conv, kept->p, made->residual >= 0 && !codes, codes ? &made->scaled : nullptr);
        if (made->sums.get()) return;
      }
      // Without a table the integers are as fast, and potentials that are round numbers, as those of attention, often lie on a threshold.
      if (kept->p.table) kept->alone = LifOfSums(kept->p);
    });
  const auto run = [this, made, kept, x, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value &vx = values_[x], &vy = values_[y];
    const char* from = place(vx, g, tile, capacity, s, 0);
    char* to = place(vy, g, tile, capacity, s, 0);
    const size_t step = stride(vx, g, tile, capacity, s), out_step = stride(vy, g, tile, capacity, s);
    uint8_t* spikes = reinterpret_cast<uint8_t*>(to);
    if (const SumsLif* alone = kept->alone.get()) {
      const Drives in{nullptr, 0, reinterpret_cast<const int32_t*>(from), nullptr, step};
      kernels_.lif_sums(*alone, in, 1, tile.count * vx.channels, spikes, out_step);
      return;
    }
    if (!made || !made->sums.get()) {
      kernels_.lif_packed(kept->p, reinterpret_cast<const int32_t*>(from), tile.count * vx.channels, step, spikes, out_step);
      return;
    }
    Drives in{reinterpret_cast<const int16_t*>(from), 2 * step, nullptr, nullptr, 0};
    if (made->residual >= 0) {
      const Value& r = values_[made->residual];
      const char* first = place(r, g, tile, capacity, s, 0);
      in.residual_step = stride(r, g, tile, capacity, s);
      if (r.kind == Kind::u8) in.codes = reinterpret_cast<const uint8_t*>(first);
      else in.residual = reinterpret_cast<const int32_t*>(first);
    }
    kernels_.lif_sums(*made->sums.get(), in, tile.count, vx.channels, spikes, out_step);
  };
  add(run, {x, y});
}

void Plan::mean_time(int x, int32_t m, int y) {
  const auto run = [this, x, m, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value& v = values_[x];
    const char* from = place(v, g, tile, capacity, s, 0);
    kernels_.mean(v.kind, from, v.steps, tile.count * v.channels, stride(v, g, tile, capacity, s), m,
                  reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, 0)));
  };
  add(run, {x, y});
}

void Plan::maxpool(int x, const Pool& p, int y) {
  const auto run = [this, x, p, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    for (int t = 0; t < values_[x].steps; ++t)
      kernels_.maxpool(p, image(values_[x], g, tile.image, t), tile.row0, tile.row1,
                       place(values_[y], g, tile, capacity, s, t));
  };
  add(run, {x, y});
}

void Plan::attention(int q, int k, int v, int heads, int32_t m, int shift, int y) {
  const Value& out = values_[y];
  const Attention a{static_cast<int>(out.positions()), out.channels, out.channels / heads, m, shift};
  const int steps = out.steps;
  const auto run = [this, q, k, v, y, a, steps](const Group& g, const Tile& tile, size_t, Scratch& s) {
    void* scratch = s.kernel.get(kernels_.attention_scratch_bytes(a));
    const auto codes = [&](int value, int t, size_t from) {
      return reinterpret_cast<const uint8_t*>(image(values_[value], g, tile.image, t)) + from;
    };
    for (int t = 0; t < steps; ++t)
      for (int head = tile.row0; head < tile.row1; ++head) {
        const size_t from = static_cast<size_t>(head) * a.head_channels;
        kernels_.attention(a, codes(q, t, from), codes(k, t, from), codes(v, t, from),
                           reinterpret_cast<int32_t*>(image(values_[y], g, tile.image, t)) + from, scratch);
      }
  };
  add(run, {q, k, v, y});
}

void Plan::attention_map(int a, int b, bool over_channels, int heads, int32_t m, int shift, int y) {
  const Value& v = values_[a];
  const Heads size{v.positions(), static_cast<size_t>(heads), static_cast<size_t>(v.channels / heads)};
  const auto run = [this, a, b, over_channels, m, shift, y, size](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    void* scratch = s.kernel.get(kernels_.maps.map_scratch_bytes(size, over_channels, tile.row1 - tile.row0));
    for (int t = 0; t < values_[y].steps; ++t)
      kernels_.maps.map(size, over_channels, reinterpret_cast<uint8_t*>(image(values_[a], g, tile.image, t)),
                        reinterpret_cast<uint8_t*>(image(values_[b], g, tile.image, t)), tile.row0, tile.row1, m, shift,
                        reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, t)), scratch);
  };
  add(run, {a, b, y});
}

void Plan::attention_read(int chosen, int x, bool over_tokens, int heads, std::vector<int32_t> m, int shift, int y) {
  const Value& v = values_[x];
  const Heads size{v.positions(), static_cast<size_t>(heads), static_cast<size_t>(v.channels / heads)};
  const auto run = [=](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const size_t first = static_cast<size_t>(tile.row0) * values_[y].width;
    void* scratch = s.kernel.get(kernels_.maps.read_scratch_bytes(size, over_tokens, tile.count));
    for (int t = 0; t < values_[y].steps; ++t)
      kernels_.maps.read(size, over_tokens, reinterpret_cast<uint8_t*>(image(values_[chosen], g, tile.image, t)),
                         reinterpret_cast<uint8_t*>(image(values_[x], g, tile.image, t)), first, tile.count,
                         m.data() + (m.size() > size.heads ? t * size.heads : 0), shift,
                         reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, t)), scratch);
  };
  add(run, {chosen, x, y});
}

void Plan::coincidences(int k, int v, int32_t m, int shift, int y) {
  const auto run = [=](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value& in = values_[k];
    for (int t = 0; t < values_[y].steps; ++t)
      for (size_t i = 0; i < tile.count; ++i)  // the output has one position per image
        bitspike::coincidences(reinterpret_cast<uint8_t*>(image(in, g, tile.first + i, t)),
                               reinterpret_cast<uint8_t*>(image(values_[v], g, tile.first + i, t)), in.positions(),
                               in.channels, m, shift,
                               reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, t)) + i * in.channels);
  };
  add(run, {k, v, y});
}

void Plan::add_codes(int a, int b, int y) {
  const auto run = [=](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    for (int t = 0; t < values_[y].steps; ++t)
      bitspike::add_codes(reinterpret_cast<uint8_t*>(place(values_[a], g, tile, capacity, s, t)),
                          reinterpret_cast<uint8_t*>(place(values_[b], g, tile, capacity, s, t)),
                          tile.count * values_[y].channels,
                          reinterpret_cast<uint8_t*>(place(values_[y], g, tile, capacity, s, t)));
  };
  add(run, {a, b, y});
}

void Plan::mask_codes(int q, int chosen, int y) {
  const auto run = [=](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    for (int t = 0; t < values_[y].steps; ++t)
      bitspike::mask_codes(reinterpret_cast<uint8_t*>(place(values_[q], g, tile, capacity, s, t)),
                           reinterpret_cast<uint8_t*>(image(values_[chosen], g, tile.image, t)), tile.count,
                           values_[y].channels, reinterpret_cast<uint8_t*>(place(values_[y], g, tile, capacity, s, t)));
  };
  add(run, {q, chosen, y});
}

void Plan::mean_space(int x, int32_t m, int y) {
  const auto run = [this, x, m, y](const Group& g, const Tile& tile, size_t capacity, Scratch& s) {
    const Value& v = values_[x];
    for (int t = 0; t < v.steps; ++t)
      for (size_t i = 0; i < tile.count; ++i)  // the output has one position per image
        kernels_.mean(v.kind, image(v, g, tile.first + i, t), v.positions(), v.channels, v.channels, m,
                      reinterpret_cast<int32_t*>(place(values_[y], g, tile, capacity, s, t)) + i * v.channels);
  };
  add(run, {x, y});
}

}  // namespace bitspike
