#include "sparse.h"

#include <algorithm>
#include <numeric>

namespace lightning_prune {
namespace {



template <int lanes>
struct Vector {
  typedef float type __attribute__((vector_size(lanes * sizeof(float))));
  typedef float anywhere __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));
  static type load(const float* from) { return *reinterpret_cast<const anywhere*>(from); }
  static void store(float* to, type value) { *reinterpret_cast<anywhere*>(to) = value; }
  static type all(float value) { return value - type{}; }
};

template <>
struct Vector<1> {
  typedef float type;
  static float load(const float* from) { return *from; }
  static void store(float* to, float value) { *to = value; }
  static float all(float value) { return value; }
};

// Loads go before stores, so that none waits for another, and vectors that overlap take the place of a loop's rest.
template <int lanes>
inline void copy(float* to, const float* from, int64_t size) {
  using V = Vector<lanes>;
  if constexpr (lanes == 1) {
    if (size > 0) *to = *from;
  } else {
    if (size < lanes) return copy<lanes / 2>(to, from, size);
    for (; size > 4 * lanes; size -= 4 * lanes, from += 4 * lanes, to += 4 * lanes) {
      const auto a = V::load(from), b = V::load(from + lanes);
      const auto c = V::load(from + 2 * lanes), d = V::load(from + 3 * lanes);
      V::store(to, a), V::store(to + lanes, b), V::store(to + 2 * lanes, c), V::store(to + 3 * lanes, d);
    }
    if (size < lanes) {  // there is something before it
      const auto a = V::load(from + size - lanes);
      V::store(to + size - lanes, a);
    } else if (size <= 2 * lanes) {
      const auto a = V::load(from), b = V::load(from + size - lanes);
      V::store(to, a), V::store(to + size - lanes, b);
    } else {
      const auto a = V::load(from), b = V::load(from + lanes);
      const auto c = V::load(from + size - 2 * lanes), d = V::load(from + size - lanes);
      V::store(to, a), V::store(to + lanes, b), V::store(to + size - 2 * lanes, c), V::store(to + size - lanes, d);
    }
  }
}

template <int lanes>
inline void clear(float* to, int64_t size) {
  using V = Vector<lanes>;
  if constexpr (lanes == 1) {
    if (size > 0) *to = 0.0f;
  } else if (size < lanes) {
    clear<lanes / 2>(to, size);
  } else {
    for (int64_t i = 0; i < size - lanes; i += lanes) V::store(to + i, V::all(0.0f));
    V::store(to + size - lanes, V::all(0.0f));
  }
}

// Rows of `from` become columns of `to`.
inline void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                      int64_t columns) {
  int64_t r = 0;
#if __has_builtin(__builtin_shufflevector)
  using V = Vector<4>;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float* at = from + r * from_stride + c;
      const auto a0 = V::load(at), a1 = V::load(at + from_stride);
      const auto a2 = V::load(at + 2 * from_stride), a3 = V::load(at + 3 * from_stride);
      const auto b0 = __builtin_shufflevector(a0, a1, 0, 4, 1, 5), b1 = __builtin_shufflevector(a2, a3, 0, 4, 1, 5);
      const auto b2 = __builtin_shufflevector(a0, a1, 2, 6, 3, 7), b3 = __builtin_shufflevector(a2, a3, 2, 6, 3, 7);
      float* out = to + c * to_stride + r;
      V::store(out, __builtin_shufflevector(b0, b1, 0, 1, 4, 5));
      V::store(out + to_stride, __builtin_shufflevector(b0, b1, 2, 3, 6, 7));
      V::store(out + 2 * to_stride, __builtin_shufflevector(b2, b3, 0, 1, 4, 5));
      V::store(out + 3 * to_stride, __builtin_shufflevector(b2, b3, 2, 3, 6, 7));
    }
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + 4; ++i) to[c * to_stride + i] = from[i * from_stride + c];
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

Plan::Plan(const Shape& shape, const Weights& weights, bool relu, const Settings& settings)
    : shape_(shape), relu_(relu), settings_(settings) {
  Shape& s = shape_;
  if (s.linear) {  // the rows of the batch are the pixels of one image
    s.width = s.out_width = s.batch;
    s.batch = 1;
  }
  flat_input_ = s.window_y * s.window_x == 1 && s.stride_y * s.stride_x == 1 && s.pad_y + s.pad_x == 0;
  if (flat_input_ && !s.linear) {  // no pixel has neighbours
    s.width = s.out_width = s.height * s.width;
    s.height = s.out_height = 1;
  }
  std::vector<bool> alive(s.inputs, false);
  for (int64_t i = weights.starts[0]; i < weights.starts[s.outputs]; ++i)
    alive[weights.taps[i] / (s.window_y * s.window_x)] = true;
  lay_out();
  cut_blocks(weights, alive);
  cut_pieces();
}

void Plan::lay_out() {
  const Shape& s = shape_;
  const bool aligned = settings_.copies == 2;
  // A stride leads to every stride-th row and column only: which of them a plane holds is its phase.
  auto phases = [](int64_t window, int64_t dilate, int64_t stride, std::vector<int32_t>& of, int64_t& most) {
    std::vector<int64_t> found;
    most = 0;
    for (int64_t i = 0; i < window; ++i) {
      const int64_t phase = i * dilate % stride;
      const auto at = std::find(found.begin(), found.end(), phase);
      of.push_back(static_cast<int32_t>(at - found.begin()));
      if (at == found.end()) found.push_back(phase);
      most = std::max(most, i * dilate / stride);
    }
    return found;
  };
  const auto rows = phases(s.window_y, s.dilate_y, s.stride_y, plane_of_row_, row_reach_);
  const auto columns = phases(s.window_x, s.dilate_x, s.stride_x, plane_of_column_, column_reach_);
  const int64_t source_wide = s.out_width + column_reach_;
  for (int64_t row : rows)
    for (int64_t column : columns) {
      const int64_t at = column - s.pad_x;
      const int64_t low = std::min(source_wide, at < 0 ? ceil_div(-at, s.stride_x) : 0);
      const int64_t high = std::max(low, std::min(source_wide, ceil_div(s.width - at, s.stride_x)));
      sources_.push_back({row - s.pad_y, at, low, high});
    }
  int64_t planes = static_cast<int64_t>(sources_.size());
  for (int32_t& row : plane_of_row_) row *= static_cast<int32_t>(aligned ? s.window_x : columns.size());
  if (aligned) {
    for (size_t row = 0; row < rows.size(); ++row)
      for (int64_t x = 0; x < s.window_x; ++x)
        planes_.push_back({static_cast<int64_t>(row * columns.size()) + plane_of_column_[x], x * s.dilate_x / s.stride_x});
    std::iota(plane_of_column_.begin(), plane_of_column_.end(), 0);
    planes = static_cast<int64_t>(planes_.size());
  }

  strip_rows_ = ceil_div(s.out_height, settings_.strips);
  const int64_t wide = s.out_width * settings_.side;
  pitch_ = aligned ? round_up(wide, settings_.lanes) : wide + column_reach_;
  stage_pitch_ = source_wide + kWidest;
  vectors_ = ceil_div((strip_rows_ - 1) * pitch_ + wide, settings_.lanes);
  settings_.vectors = std::min(settings_.vectors, vectors_);
  tiles_ = ceil_div(vectors_, settings_.vectors);
  settings_.band = std::min(settings_.band, tiles_);

  plane_ = stage_rows_ = 0;
  for (int64_t first = 0; first < tiles_; first += settings_.band) {
    const Task task{0, 0, first, std::min(settings_.band, tiles_ - first), 0, 1};
    const int64_t end = tile_start(first + task.tiles);
    int64_t reach = end - origin(task);
    stage_rows_ = std::max(stage_rows_, ceil_div(reach, pitch_) + row_reach_);
    if (!flat_input_) reach = (ceil_div(reach, pitch_) + row_reach_) * pitch_;
    plane_ = std::max(plane_, reach);
  }
  // Whole cache lines, an odd number of them, so that channels do not compete for the same places in the caches.
  plane_ = round_up(plane_ + column_reach_ + kWidest, 16);
  channel_ = planes * plane_;
  if (channel_ / 16 % 2 == 0) channel_ += 16;
  settings_.channels = std::max<int64_t>(1, std::min(settings_.channels, 65536 / channel_));
}

int64_t Plan::origin(const Task& task) const {
  const int64_t start = tile_start(task.first_tile);
  return flat_input_ ? start : start / pitch_ * pitch_;
}

void Plan::cut_blocks(const Weights& weights, const std::vector<bool>& alive) {
  const Shape& s = shape_;
  const int64_t window = s.window_y * s.window_x;
  bias_.assign(s.outputs, 0.0f);
  if (weights.bias) std::copy(weights.bias, weights.bias + s.outputs, bias_.begin());

  std::vector<int32_t> block_of(s.inputs, 0), place(s.inputs, 0);
  blocks_.emplace_back();
  for (int64_t c = 0; c < s.inputs; ++c) {
    if (!alive[c]) continue;
    if (static_cast<int64_t>(blocks_.back().channels.size()) == settings_.channels) blocks_.emplace_back();
    block_of[c] = static_cast<int32_t>(blocks_.size()) - 1;
    place[c] = static_cast<int32_t>(blocks_.back().channels.size());
    blocks_.back().channels.push_back(static_cast<int32_t>(c));
  }

  // Filters are dealt out by how much they do: threads that take every n-th share have the same to do.
  std::vector<int32_t> order(s.outputs), share(s.outputs);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    return weights.starts[x + 1] - weights.starts[x] < weights.starts[y + 1] - weights.starts[y];
  });
  for (int64_t i = 0; i < s.outputs; ++i) share[order[i]] = static_cast<int32_t>(i);

  // Each block's filters, those with equally many weights together: the processor then foresees the loops' ends.
  std::vector<std::vector<Filter>> cut(blocks_.size());
  for (int64_t o = 0; o < s.outputs; ++o) {
    int64_t i = weights.starts[o];
    const int64_t end = weights.starts[o + 1];
    if (i == end) cut[0].push_back({static_cast<int32_t>(o), static_cast<int32_t>(i), 0, share[o], true, true});
    for (bool first = true; i < end; first = false) {
      const int32_t block = block_of[weights.taps[i] / window];
      int64_t j = i;
      while (j < end && block_of[weights.taps[j] / window] == block) ++j;
      cut[block].push_back(
          {static_cast<int32_t>(o), static_cast<int32_t>(i), static_cast<int32_t>(j - i), share[o], first,
           j == end});
      i = j;
    }
  }
  values_.reserve(weights.starts[s.outputs]);
  offsets_.reserve(weights.starts[s.outputs]);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    std::stable_sort(cut[b].begin(), cut[b].end(), [](const Filter& x, const Filter& y) { return x.count < y.count; });
    for (Filter filter : cut[b]) {
      const int64_t begin = filter.begin;
      filter.begin = static_cast<int32_t>(values_.size());
      for (int64_t i = begin; i < begin + filter.count; ++i) {
        const int64_t tap = weights.taps[i], y = tap % window / s.window_x, x = tap % s.window_x;
        const int64_t column = settings_.copies == 2 ? 0 : x * s.dilate_x / s.stride_x;
        const int64_t plane = plane_of_row_[y] + plane_of_column_[x];
        values_.push_back(weights.values[i]);
        offsets_.push_back(static_cast<uint16_t>(place[tap / window] * channel_ + plane * plane_ +
                                                 y * s.dilate_y / s.stride_y * pitch_ + column));
      }
      blocks_[b].filters.push_back(filter);
    }
  }
}

void Plan::cut_pieces() {
  const Shape& s = shape_;
  pieces_.resize(tiles_);
  for (int64_t t = 0; t < tiles_; ++t) {
    const int64_t start = tile_start(t), end = tile_start(t + 1);
    for (int64_t strip = 0; strip < settings_.side; ++strip)
      for (int64_t row = start / pitch_; row < strip_rows_ && row * pitch_ < end; ++row) {
        const int64_t at = row * pitch_ + strip * s.out_width, image = strip / settings_.strips;
        const int64_t out_row = strip % settings_.strips * strip_rows_ + row;
        if (out_row >= s.out_height) break;
        const int64_t from = std::max(start, at), to = std::min(end, at + s.out_width);
        if (from >= to) continue;
        pieces_[t].push_back({static_cast<int32_t>(from - start), static_cast<int32_t>(to - from),
                              static_cast<int32_t>(strip),
                              (image * s.outputs * s.out_height + out_row) * s.out_width + from - at});
      }
  }
}

// Inputs whose pixels have no neighbours: the positions of a band, whatever rows they are in.
void Plan::pack_flat(const float* input, const Task& task, const Block& block, float* panel) const {
  const Shape& s = shape_;
  const int64_t start = origin(task), end = tile_start(task.first_tile + task.tiles);
  const int64_t channels = static_cast<int64_t>(block.channels.size());
  if (s.linear) {
    const int64_t rows = std::min(end, s.width) - start;
    for (int64_t c = 0, run; c < channels; c += run) {
      for (run = 1; c + run < channels && block.channels[c + run] == block.channels[c] + run;) ++run;
      transpose(panel + c * channel_, channel_, input + start * s.inputs + block.channels[c], s.inputs, rows, run);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t image = start / s.width; image < task.strips && image * s.width < end; ++image) {
      const int64_t from = std::max(start, image * s.width), to = std::min(end, (image + 1) * s.width);
      const float* source = input + ((task.strip + image) * s.inputs + block.channels[c]) * s.width;
      copy<kWidest>(panel + c * channel_ + from - start, source + from - image * s.width, to - from);
    }
}

// Rows of one channel, padded, from row `first` of each strip on.
void Plan::pack_rows(const float* input, const Task& task, const Source& source, int64_t first, int64_t rows,
                     float* to, int64_t row_step, int64_t strip_step, bool margins) const {
  const Shape& s = shape_;
  const int64_t size = source.high - source.low, wide = s.out_width + column_reach_;
  for (int64_t strip = 0; strip < task.strips; ++strip, to += strip_step) {
    const int64_t image = (task.strip + strip) / settings_.strips;
    const float* from = input + image * s.inputs * s.height * s.width + source.column + source.low * s.stride_x;
    int64_t row = ((task.strip + strip) % settings_.strips * strip_rows_ + first) * s.stride_y + source.row;
    float* out = to;
    for (int64_t q = 0; q < rows; ++q, out += row_step, row += s.stride_y) {
      if (row < 0 || row >= s.height) {
        if (margins) clear<kWidest>(out, wide);
        continue;
      }
      if (margins && source.low > 0) clear<kWidest>(out, source.low);
      if (s.stride_x == 1)
        copy<kWidest>(out + source.low, from + row * s.width, size);
      else
        for (int64_t x = 0; x < size; ++x) out[source.low + x] = from[row * s.width + x * s.stride_x];
      if (margins && source.high < wide) clear<kWidest>(out + source.high, wide - source.high);
    }
  }
}

void Plan::pack(const float* input, const Task& task, const Block& block, float* panel, float* stage) const {
  if (flat_input_) return pack_flat(input, task, block, panel);
  using V = Vector<kWidest>;
  const Shape& s = shape_;
  const int64_t start = origin(task), end = tile_start(task.first_tile + task.tiles);
  const int64_t first = start / pitch_, rows = ceil_div(end - start, pitch_) + row_reach_;
  const int64_t strip_size = stage_rows_ * stage_pitch_, stage_size = settings_.side * strip_size;
  const int64_t across = ceil_div(s.out_width, kWidest);
  if (!planes_.empty()) std::fill(stage, stage + static_cast<int64_t>(sources_.size()) * stage_size, 0.0f);
  for (size_t c = 0; c < block.channels.size(); ++c) {
    const float* channel = input + block.channels[c] * s.height * s.width;
    float* to = panel + static_cast<int64_t>(c) * channel_;
    if (planes_.empty()) {
      for (size_t i = 0; i < sources_.size(); ++i)
        pack_rows(channel, task, sources_[i], first, rows, to + static_cast<int64_t>(i) * plane_, pitch_, s.out_width, true);
      continue;
    }
    for (size_t i = 0; i < sources_.size(); ++i)
      pack_rows(channel, task, sources_[i], first, rows, stage + static_cast<int64_t>(i) * stage_size, stage_pitch_,
                strip_size, false);
    for (const Shifted& plane : planes_) {
      const float* from = stage + plane.source * stage_size + plane.shift;
      // Whole vectors: what goes beyond a strip is overwritten by the next one.
      for (int64_t q = 0; q < rows; ++q)
        for (int64_t strip = 0; strip < task.strips; ++strip) {
          const float* row = from + strip * strip_size + q * stage_pitch_;
          float* out = to + q * pitch_ + strip * s.out_width;
          for (int64_t v = 0; v < across; ++v) V::store(out + v * kWidest, V::load(row + v * kWidest));
        }
      to += plane_;
    }
  }
}

template <int lanes, int vectors>
void Plan::filters(const Task& task, int64_t tile, const Block& block, const float* panel, float* sums,
                   const float* residual, float* output) const {
  using V = Vector<lanes>;
  // A sum waits four cycles for the one before it: short tiles keep several going.
  constexpr int chains = vectors >= 7 ? 1 : vectors >= 4 ? 2 : 4;
  constexpr int size = lanes * vectors;
  const int64_t out_pixels = shape_.out_height * shape_.out_width;
  const std::vector<Piece>& pieces = pieces_[tile];
  const bool whole = pieces.size() == 1 && pieces[0].length == size;
  for (const Filter& filter : block.filters) {
    if (task.parts > 1 && filter.share % task.parts != task.part) continue;
    if (whole && filter.last) {
      const float* to = output + (task.strip / settings_.strips * shape_.outputs + filter.output) * out_pixels;
      for (int i = 0; i < size; i += 16) __builtin_prefetch(to + pieces[0].to + i, 1);
    }
    float* sum = sums + filter.output * size;
    typename V::type total[chains][vectors];
    for (int v = 0; v < vectors; ++v)
      total[0][v] = filter.first ? V::all(bias_[filter.output]) : V::load(sum + v * lanes);
    for (int c = 1; c < chains; ++c)
      for (int v = 0; v < vectors; ++v) total[c][v] = V::all(0.0f);
    const float* value = values_.data() + filter.begin;
    const uint16_t* offset = offsets_.data() + filter.begin;
    int i = 0;
    for (; i + chains <= filter.count; i += chains)
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        const typename V::type weight = V::all(value[i + c]);
        const float* from = panel + offset[i + c];
#pragma GCC unroll 14
        for (int v = 0; v < vectors; ++v) total[c][v] += weight * V::load(from + v * lanes);
      }
    for (; i < filter.count; ++i) {
      const typename V::type weight = V::all(value[i]);
      const float* from = panel + offset[i];
#pragma GCC unroll 14
      for (int v = 0; v < vectors; ++v) total[0][v] += weight * V::load(from + v * lanes);
    }
    for (int c = 1; c < chains; ++c)
      for (int v = 0; v < vectors; ++v) total[0][v] += total[c][v];
    if (!filter.last || shape_.linear) {
      for (int v = 0; v < vectors; ++v) V::store(sum + v * lanes, total[0][v]);
      continue;
    }
    const int64_t at = (task.strip / settings_.strips * shape_.outputs + filter.output) * out_pixels;
    if (whole && !residual) {
      float* to = output + at + pieces[0].to;
      for (int v = 0; v < vectors; ++v) {
        if (relu_) total[0][v] = total[0][v] < V::all(0.0f) ? V::all(0.0f) : total[0][v];
        V::store(to + v * lanes, total[0][v]);
      }
      continue;
    }
    float done[size];
    for (int v = 0; v < vectors; ++v) V::store(done + v * lanes, total[0][v]);
    for (const Piece& piece : pieces) {
      if (piece.strip >= task.strips) break;
      const float* from = done + piece.from;
      float* to = output + at + piece.to;
      if (residual) {
        const float* add = residual + at + piece.to;
        for (int64_t x = 0; x < piece.length; ++x) {
          const float y = from[x] + add[x];
          to[x] = relu_ && y < 0.0f ? 0.0f : y;
        }
      } else if (relu_) {
        for (int64_t x = 0; x < piece.length; ++x) to[x] = from[x] < 0.0f ? 0.0f : from[x];
      } else {
        copy<kWidest>(to, from, piece.length);
      }
    }
  }
}

template <int lanes>
void Plan::tile(int64_t vectors, const Task& task, int64_t tile, const Block& block, const float* panel, float* sums,
                const float* residual, float* output) const {
  switch (vectors) {
#define LIGHTNING_PRUNE_CASE(n) \
  case n:                       \
    return filters<lanes, n>(task, tile, block, panel, sums, residual, output);
    LIGHTNING_PRUNE_CASE(1)
    LIGHTNING_PRUNE_CASE(2)
    LIGHTNING_PRUNE_CASE(3)
    LIGHTNING_PRUNE_CASE(4)
    LIGHTNING_PRUNE_CASE(5)
    LIGHTNING_PRUNE_CASE(6)
    LIGHTNING_PRUNE_CASE(7)
    LIGHTNING_PRUNE_CASE(8)
    LIGHTNING_PRUNE_CASE(9)
    LIGHTNING_PRUNE_CASE(10)
    LIGHTNING_PRUNE_CASE(11)
    LIGHTNING_PRUNE_CASE(12)
    LIGHTNING_PRUNE_CASE(13)
    LIGHTNING_PRUNE_CASE(14)
#undef LIGHTNING_PRUNE_CASE
  }
}

void Plan::work(const Task& task, const float* input, const float* residual, float* output) const {
  const Shape& s = shape_;
  const int64_t largest = settings_.lanes * ceil_div(vectors_, tiles_);
  static thread_local std::vector<float> memory;
  const int64_t panel_size = settings_.channels * channel_;
  const int64_t sums_size = task.tiles * s.outputs * largest;
  const int64_t stage_size = static_cast<int64_t>(sources_.size()) * settings_.side * stage_rows_ * stage_pitch_ + kWidest;
  const size_t needed = static_cast<size_t>(16 + panel_size + sums_size + stage_size);
  if (memory.size() < needed) memory.assign(needed, 0.0f);
  float* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16;
  float* sums = panel + panel_size;
  const int64_t start = origin(task);
  for (const Block& block : blocks_) {
    pack(input, task, block, panel, sums + sums_size);
    for (int64_t i = 0; i < task.tiles; ++i) {
      const int64_t t = task.first_tile + i, at = tile_start(t);
      const int64_t vectors = (tile_start(t + 1) - at) / settings_.lanes;
      float* mine = sums + i * s.outputs * largest;
      if (settings_.lanes == 1) this->tile<1>(vectors, task, t, block, panel + at - start, mine, residual, output);
      if (settings_.lanes == 4) this->tile<4>(vectors, task, t, block, panel + at - start, mine, residual, output);
      if constexpr (kWidest >= 8)
        if (settings_.lanes == 8) this->tile<8>(vectors, task, t, block, panel + at - start, mine, residual, output);
      if constexpr (kWidest >= 16)
        if (settings_.lanes == 16) this->tile<16>(vectors, task, t, block, panel + at - start, mine, residual, output);
    }
  }
  if (!s.linear) return;
  for (int64_t i = 0; i < task.tiles; ++i) {
    const int64_t t = task.first_tile + i, at = tile_start(t), size = tile_start(t + 1) - at;
    const float* mine = sums + i * s.outputs * largest;
    const int64_t rows = std::min(size, s.width - at);
    transpose(output + at * s.outputs, s.outputs, mine, size, s.outputs, rows);
    if (residual)
      for (int64_t j = at * s.outputs; j < (at + rows) * s.outputs; ++j) output[j] += residual[j];
    if (relu_)
      for (int64_t j = at * s.outputs; j < (at + rows) * s.outputs; ++j) output[j] = output[j] < 0.0f ? 0.0f : output[j];
  }
}

void Plan::run(const float* input, const float* residual, float* output, int64_t threads,
               const ParallelFor& parallel) const {
  const int64_t strips = shape_.batch * settings_.strips;
  const int64_t groups = ceil_div(strips, settings_.side), bands = ceil_div(tiles_, settings_.band);
  // Where there are fewer bands than threads, threads share the filters of a band.
  const int64_t parts = shape_.linear ? 1 : std::min(shape_.outputs, ceil_div(threads, groups * bands));
  auto some = [&](int64_t begin, int64_t end) {
    auto task = [&](int64_t i) -> Task {
      const int64_t strip = i / (bands * parts) * settings_.side, band = i / parts % bands;
      const int64_t first = band * settings_.band;
      return {strip, std::min(settings_.side, strips - strip), first, std::min(settings_.band, tiles_ - first),
              i % parts, parts};
    };
    for (int64_t i = begin; i < end; ++i)
      work(task(i), input, residual, output);
  };
  const int64_t tasks = groups * bands * parts;
  if (threads > 1 && tasks > 1)
    parallel(tasks, some);
  else
    some(0, tasks);
}

}  // namespace lightning_prune
