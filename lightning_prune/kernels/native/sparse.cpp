#include "sparse.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

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

// Rows of four numbers, `from(i)`, become four columns, `to(i)`.
template <int rows, typename To, typename From>
inline void transpose4(const To& to, const From& from) {
  static_assert(rows == 4 || rows == 8);
#if __has_builtin(__builtin_shufflevector)
  using V = Vector<rows>;
  auto load = [&](int i) {
    if constexpr (rows == 4)
      return V::load(from(i));
    else
      return __builtin_shufflevector(Vector<4>::load(from(i)), Vector<4>::load(from(i + 4)), 0, 1, 2, 3, 4, 5, 6, 7);
  };
  const auto a0 = load(0), a1 = load(1), a2 = load(2), a3 = load(3);
  if constexpr (rows == 4) {
    const auto b0 = __builtin_shufflevector(a0, a1, 0, 4, 1, 5), b1 = __builtin_shufflevector(a2, a3, 0, 4, 1, 5);
    const auto b2 = __builtin_shufflevector(a0, a1, 2, 6, 3, 7), b3 = __builtin_shufflevector(a2, a3, 2, 6, 3, 7);
    V::store(to(0), __builtin_shufflevector(b0, b1, 0, 1, 4, 5));
    V::store(to(1), __builtin_shufflevector(b0, b1, 2, 3, 6, 7));
    V::store(to(2), __builtin_shufflevector(b2, b3, 0, 1, 4, 5));
    V::store(to(3), __builtin_shufflevector(b2, b3, 2, 3, 6, 7));
  } else {  // two times four rows at once
    const auto b0 = __builtin_shufflevector(a0, a1, 0, 8, 1, 9, 4, 12, 5, 13);
    const auto b1 = __builtin_shufflevector(a2, a3, 0, 8, 1, 9, 4, 12, 5, 13);
    const auto b2 = __builtin_shufflevector(a0, a1, 2, 10, 3, 11, 6, 14, 7, 15);
    const auto b3 = __builtin_shufflevector(a2, a3, 2, 10, 3, 11, 6, 14, 7, 15);
    V::store(to(0), __builtin_shufflevector(b0, b1, 0, 1, 8, 9, 4, 5, 12, 13));
    V::store(to(1), __builtin_shufflevector(b0, b1, 2, 3, 10, 11, 6, 7, 14, 15));
    V::store(to(2), __builtin_shufflevector(b2, b3, 0, 1, 8, 9, 4, 5, 12, 13));
    V::store(to(3), __builtin_shufflevector(b2, b3, 2, 3, 10, 11, 6, 7, 14, 15));
  }
#else
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 4; ++c) to(c)[r] = from(r)[c];
#endif
}

// Rows, of `columns` numbers, become columns, of `rows` numbers. Blocks that overlap take the place of a loop's rest.
// `together` rows are done before the next ones, 16 to fill the cache lines of columns that compete for one place.
template <int together, typename To, typename From>
inline void transpose(const To& to, const From& from, int64_t rows, int64_t columns) {
  if (rows < 4 || columns < 4) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to(c)[r] = from(r)[c];
    return;
  }
  auto blocks = [&](auto height) {
    for (int64_t i = 0; i < rows; i += together)
      for (int64_t j = 0; j < columns; j += 4)
        for (int64_t k = i; k < std::min(i + together, rows); k += height) {
          const int64_t r = std::min(k, rows - height), c = std::min(j, columns - 4);
          transpose4<height>([&](int64_t n) { return to(c + n) + r; }, [&](int64_t n) { return from(r + n) + c; });
        }
  };
  if (kWidest < 8 || rows < 8)
    blocks(std::integral_constant<int, 4>());
  else
    blocks(std::integral_constant<int, 8>());
}

constexpr int64_t kVisit = 8;  // weights that take as long as what a filter takes beside its weights

constexpr int64_t kAhead = 4;  // channels whose input is fetched before its turn

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

void lay_batch_last(const float* from, float* to, int64_t batch, int64_t size) {
  transpose<16>([&](int64_t c) { return to + c * batch; }, [&](int64_t r) { return from + r * size; }, batch, size);
}

Plan::Plan(const Shape& shape, const Weights& weights, bool relu, const Settings& settings)
    : shape_(shape), relu_(relu), flat_(!settings.woven), settings_(settings) {
  Shape& s = shape_;
  const bool pointwise =
      s.window_y * s.window_x == 1 && s.stride_y * s.stride_x == 1 && s.pad_y == 0 && s.pad_x == 0;
  const int64_t lanes = settings.lanes;
  const bool known = lanes == 4 || (lanes == 8 && kWidest >= 8) || (lanes == 16 && kWidest >= 16);
  if ((!known && (lanes != 1 || !flat_)) || (flat_ && (!pointwise || settings.rows != 1 || settings.strips != 1)) ||
      (s.linear && !flat_) || (s.beside && (flat_ || settings.strips != 1 || s.batch % lanes || s.width % s.beside)) ||
      settings.rows < 1 || settings.rows > 2 || settings.columns < 1 ||
      settings.rows * settings.columns > kMostVectors || settings.strips < 1 || settings.channels < 1 ||
      settings.band < 1)
    throw std::invalid_argument("these settings do not fit the layer");
  if (s.linear) {  // the rows of the batch are the pixels of one image
    s.width = s.out_width = s.batch;
    s.batch = 1;
  } else if (flat_) {  // no pixel has neighbours
    s.width = s.out_width = s.height * s.width;
    s.height = s.out_height = 1;
  }
  lay_out();
  cut_blocks(weights);
}

void Plan::lay_out() {
  const Shape& s = shape_;
  settings_.strips = std::min(settings_.strips, s.out_height);
  strip_rows_ = ceil_div(s.out_height, settings_.strips);
  down_ = strip_rows_;
  across_ = flat_ ? ceil_div(s.out_width, settings_.lanes) : s.out_width;
  settings_.rows = std::min(settings_.rows, down_);
  settings_.columns = std::min(settings_.columns, across_);
  tiles_across_ = ceil_div(across_, settings_.columns);
  tiles_ = tiles_across_ * ceil_div(down_, settings_.rows);
  settings_.band = std::min(settings_.band, tiles_);
  const int64_t reach_x = (s.window_x - 1) * s.dilate_x, reach_y = (s.window_y - 1) * s.dilate_y;
  pitch_ = flat_ ? 0 : ((s.out_width - 1) * s.stride_x + reach_x + 1) * settings_.lanes;
  step_ = s.stride_x * settings_.lanes;
  skip_ = s.stride_y * pitch_;
  // Most numbers of a channel that any band needs.
  channel_ = 0;
  for (int64_t first = 0; first < tiles_; first += settings_.band) {
    const Tile from = tile(first), to = tile(std::min(first + settings_.band, tiles_) - 1);
    const int64_t rows = (to.row + to.rows - from.row - 1) * s.stride_y + reach_y + 1;
    channel_ = std::max(channel_, flat_ ? (to.column + to.columns - from.column) * settings_.lanes : rows * pitch_);
  }
  // Whole cache lines, an odd number of them, so that channels do not compete for the same places in the caches.
  channel_ = round_up(channel_, 16);
  if (channel_ / 16 % 2 == 0) channel_ += 16;
  if (channel_ > kMostNumbers) throw std::invalid_argument("a band is too large for offsets of 16 bits");
  settings_.channels = std::min(settings_.channels, kMostNumbers / channel_);
}

Plan::Tile Plan::tile(int64_t index) const {
  const int64_t i = index / tiles_across_, j = index % tiles_across_, row = i * settings_.rows;
  const int64_t column = j * across_ / tiles_across_;
  return {row, std::min(settings_.rows, down_ - row), column, (j + 1) * across_ / tiles_across_ - column};
}

void Plan::cut_blocks(const Weights& weights) {
  const Shape& s = shape_;
  const int64_t window = s.window_y * s.window_x;
  bias_.assign(s.outputs, 0.0f);
  if (weights.bias) std::copy(weights.bias, weights.bias + s.outputs, bias_.begin());

  std::vector<bool> alive(s.inputs, false);
  for (int64_t i = weights.starts[0]; i < weights.starts[s.outputs]; ++i) alive[weights.taps[i] / window] = true;
  std::vector<int32_t> block_of(s.inputs, 0), place(s.inputs, 0);
  blocks_.emplace_back();
  for (int64_t c = 0; c < s.inputs; ++c) {
    if (!alive[c]) continue;
    if (static_cast<int64_t>(blocks_.back().channels.size()) == settings_.channels) blocks_.emplace_back();
    block_of[c] = static_cast<int32_t>(blocks_.size()) - 1;
    place[c] = static_cast<int32_t>(blocks_.back().channels.size());
    blocks_.back().channels.push_back(static_cast<int32_t>(c));
  }

  effort_.resize(s.outputs + 1);
  for (int64_t o = 0; o <= s.outputs; ++o) effort_[o] = weights.starts[o] - weights.starts[0] + o * kVisit;

  // Each block's filters, those with equally many weights together: the processor then foresees the loops' ends.
  std::vector<std::vector<Filter>> cut(blocks_.size());
  for (int64_t o = 0; o < s.outputs; ++o) {
    int64_t i = weights.starts[o];
    const int64_t end = weights.starts[o + 1];
    if (i == end) cut[0].push_back({static_cast<int32_t>(o), static_cast<int32_t>(i), 0, true, true});
    for (bool first = true; i < end; first = false) {
      const int32_t block = block_of[weights.taps[i] / window];
      int64_t j = i;
      while (j < end && block_of[weights.taps[j] / window] == block) ++j;
      cut[block].push_back(
          {static_cast<int32_t>(o), static_cast<int32_t>(i), static_cast<int32_t>(j - i), first, j == end});
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
        values_.push_back(weights.values[i]);
        const int64_t offset =
            place[tap / window] * channel_ + y * s.dilate_y * pitch_ + x * s.dilate_x * settings_.lanes;
        offsets_.push_back(static_cast<uint16_t>(offset / 2));  // all of them are even
      }
      blocks_[b].filters.push_back(filter);
    }
  }
}

// Where a part of the filters begins, if parts have about the same to do.
int32_t Plan::first_output(int64_t part, int64_t parts) const {
  const int64_t before = effort_.back() * part / parts;
  return static_cast<int32_t>(std::lower_bound(effort_.begin(), effort_.end(), before) - effort_.begin());
}

// The positions of a band, side by side.
void Plan::pack_flat(const float* input, const Task& task, const Block& block, float* panel) const {
  const Shape& s = shape_;
  const Tile last = tile(task.first_tile + task.tiles - 1);
  const int64_t start = tile(task.first_tile).column * settings_.lanes;
  const int64_t size = std::min((last.column + last.columns) * settings_.lanes, s.width) - start;
  const int64_t channels = static_cast<int64_t>(block.channels.size());
  for (int64_t c = 0, run = 1; c < channels; c += run) {
    if (!task.rows) {
      const float* from = input + task.strip * s.inputs * s.width + start;
      if (c + kAhead < channels)  // channels lie too far apart for the processor to foresee the next ones
        for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(from + block.channels[c + kAhead] * s.width + i);
      copy<kWidest>(panel + c * channel_, from + block.channels[c] * s.width, size);
      continue;
    }
    for (run = 1; c + run < channels && block.channels[c + run] == block.channels[c] + run;) ++run;
    const float* from = input + start * s.inputs + block.channels[c];
    transpose<8>([&](int64_t i) { return panel + (c + i) * channel_; }, [&](int64_t r) { return from + r * s.inputs; },
              size, run);
  }
}

Plan::Rows Plan::rows_under(const Task& task) const {
  const Shape& s = shape_;
  const Tile first = tile(task.first_tile), last = tile(task.first_tile + task.tiles - 1);
  const int64_t reach = (s.window_y - 1) * s.dilate_y + 1;
  const int64_t wide = pitch_ / settings_.lanes, left = std::min(s.pad_x, wide);
  return {first.row * s.stride_y - s.pad_y, (last.row + last.rows - first.row - 1) * s.stride_y + reach, wide, left,
          std::max<int64_t>(0, std::min(s.width, wide - left))};
}

// Rows of a band with their padding, pixel by pixel, of all strips.
template <int lanes>
void Plan::pack_woven(const float* input, const Task& task, const Block& block, float* panel,
                      const float* zeros) const {
  const Shape& s = shape_;
  const Rows rows = rows_under(task);
  const int64_t wide = rows.wide, left = rows.left, size = rows.size;
  const float* image[lanes];
  int64_t start[lanes];
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t strip = task.strip + std::min(l, task.strips - 1);
    image[l] = input + strip / settings_.strips * s.inputs * s.height * s.width;
    start[l] = strip % settings_.strips * strip_rows_ * s.stride_y + rows.start;
  }
  for (size_t c = 0; c < block.channels.size(); ++c) {
    const int64_t channel = block.channels[c] * s.height;
    float* to = panel + static_cast<int64_t>(c) * channel_;
    for (int64_t q = 0; q < rows.count; ++q, to += pitch_) {
      const float* from[lanes];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t row = start[l] + q;
        from[l] = row < 0 || row >= s.height ? zeros : image[l] + (channel + row) * s.width;
      }
      if (left > 0) clear<kWidest>(to, left * lanes);
      transpose<8>([&](int64_t x) { return to + (left + x) * lanes; }, [&](int64_t l) { return from[l]; }, lanes, size);
      if (left + size < wide) clear<kWidest>(to + (left + size) * lanes, (wide - left - size) * lanes);
    }
  }
}

// The same of images that lie woven already.
template <int lanes>
void Plan::pack_batch_last(const float* input, const Task& task, const Block& block, float* panel) const {
  using V = Vector<lanes>;
  const Shape& s = shape_;
  const Rows rows = rows_under(task);
  const int64_t wide = rows.wide, left = rows.left, size = rows.size;
  const int64_t pixel = s.batch * s.beside, wanted = s.beside * lanes;
  for (size_t c = 0; c < block.channels.size(); ++c) {
    float* to = panel + static_cast<int64_t>(c) * channel_;
    for (int64_t q = 0; q < rows.count; ++q, to += pitch_) {
      const int64_t row = rows.start + q;
      if (row < 0 || row >= s.height) {
        clear<kWidest>(to, pitch_);
        continue;
      }
      if (left > 0) clear<kWidest>(to, left * lanes);
      const float* from = input + (block.channels[c] * s.height + row) * s.width * s.batch + task.strip;
      if (pixel == wanted)
        copy<kWidest>(to + left * lanes, from, size * lanes);
      else
        for (float *at = to + left * lanes, *end = at + size * lanes; at < end; at += wanted, from += pixel)
          for (int64_t i = 0; i < wanted; i += lanes) V::store(at + i, V::load(from + i));
      if (left + size < wide) clear<kWidest>(to + (left + size) * lanes, (wide - left - size) * lanes);
    }
  }
}

void Plan::pack(const float* input, const Task& task, const Block& block, float* panel, const float* zeros) const {
  if (flat_) return pack_flat(input, task, block, panel);
  if (shape_.beside) {
    if (settings_.lanes == 4) return pack_batch_last<4>(input, task, block, panel);
    if constexpr (kWidest >= 8)
      if (settings_.lanes == 8) return pack_batch_last<8>(input, task, block, panel);
    if constexpr (kWidest >= 16) return pack_batch_last<16>(input, task, block, panel);
    return;
  }
  if (settings_.lanes == 4) return pack_woven<4>(input, task, block, panel, zeros);
  if constexpr (kWidest >= 8)
    if (settings_.lanes == 8) return pack_woven<8>(input, task, block, panel, zeros);
  if constexpr (kWidest >= 16) return pack_woven<16>(input, task, block, panel, zeros);
}

template <int lanes, int rows, int columns, int stride>
void Plan::filters(const Target& target) const {
  using V = Vector<lanes>;
  constexpr int vectors = rows * columns, size = lanes * vectors;
  // A sum waits four cycles for the one before it: short tiles keep several going.
  constexpr int chains = vectors >= 7 ? 1 : vectors >= 4 ? 2 : 4;
  // Each row of the tile has a base of its own, so that addresses are a base, an offset and a constant.
  const float *const above = target.panel, *const below = above + skip_;
  const int64_t step = stride > 0 ? stride * lanes : step_;
  const int64_t pixels = shape_.out_height * shape_.out_width * (shape_.beside ? shape_.batch : 1);
  const auto all_zero = V::all(0.0f);
  const std::vector<Filter>& all_filters = target.block->filters;
  for (size_t n = 0; n < all_filters.size(); ++n) {
    const Filter& filter = all_filters[n];
    if (filter.output < target.first_output || filter.output >= target.end_output) continue;
    if (n + 1 < all_filters.size() && !all_filters[n + 1].first)  // sums lie apart, as filters are in another order
      for (int i = 0; i < size; i += 16) __builtin_prefetch(target.sums + all_filters[n + 1].output * size + i);
    float* sum = target.sums + filter.output * size;
    float* to = target.output + filter.output * pixels;
    if (flat_ && filter.last && !shape_.linear)
      for (int i = 0; i < size; i += 16) __builtin_prefetch(to + i, 1);
    typename V::type total[chains][vectors];
    for (int v = 0; v < vectors; ++v)
      total[0][v] = filter.first ? V::all(bias_[filter.output]) : V::load(sum + v * lanes);
    for (int c = 1; c < chains; ++c)
      for (int v = 0; v < vectors; ++v) total[c][v] = all_zero;
    const float* value = values_.data() + filter.begin;
    const uint16_t* offset = offsets_.data() + filter.begin;
    auto multiply = [&](typename V::type* sums, int i) {
      const typename V::type weight = V::all(value[i]);
      const int64_t at = 2 * static_cast<int64_t>(offset[i]);
      auto along = [&](int row, const float* from) {
#pragma GCC unroll 14
        for (int c = 0; c < columns; ++c) sums[row * columns + c] += weight * V::load(from + at + c * step);
      };
      along(0, above);
      if constexpr (rows == 2) along(1, below);
    };
    int i = 0;
    constexpr int together = std::max(chains, 2);
    for (; i + together <= filter.count; i += together)
#pragma GCC unroll 4
      for (int c = 0; c < together; ++c) multiply(total[c % chains], i + c);
    for (; i < filter.count; ++i) multiply(total[0], i);
    for (int c = 1; c < chains; ++c)
      for (int v = 0; v < vectors; ++v) total[0][v] += total[c][v];
    if (filter.last && relu_)
      for (int v = 0; v < vectors; ++v) total[0][v] = total[0][v] < all_zero ? all_zero : total[0][v];
    if (!filter.last || shape_.linear) {
      for (int v = 0; v < vectors; ++v) V::store(sum + v * lanes, total[0][v]);
      continue;
    }
    if (flat_ && target.length == size) {
      for (int v = 0; v < vectors; ++v) V::store(to + v * lanes, total[0][v]);
      continue;
    }
    if (shape_.beside) {
      for (int v = 0; v < vectors; ++v) V::store(to + target.places[v], total[0][v]);
      continue;
    }
    float done[size];
    for (int v = 0; v < vectors; ++v) V::store(done + v * lanes, total[0][v]);
    if (flat_) {
      copy<kWidest>(to, done, target.length);
      continue;
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t* places = target.places + r * lanes;
      const float* from = done + r * columns * lanes;
      constexpr int high = kWidest >= 8 && columns >= 8 ? 8 : 4;
      for (int l = 0; l < lanes; l += 4) {
        if (columns >= 4 && lanes >= 4 && std::min({places[l], places[l + 1], places[l + 2], places[l + 3]}) >= 0) {
#pragma GCC unroll 4
          for (int j = 0; j < columns; j += high) {
            const int c = std::min(j, columns - high);
            transpose4<high>([&](int k) { return to + places[l + k] + c; },
                             [&](int k) { return from + (c + k) * lanes + l; });
          }
          continue;
        }
        for (int k = l; k < l + 4 && k < lanes; ++k)
          if (places[k] >= 0)
            for (int c = 0; c < columns; ++c) to[places[k] + c] = from[c * lanes + k];
      }
    }
  }
}

template <int lanes>
void Plan::dispatch(const Tile& tile, const Target& target) const {
  const int64_t stride = shape_.stride_x;
  switch (tile.rows * 16 + tile.columns) {
#define LIGHTNING_PRUNE_CASE(rows, columns)                                     \
  case rows * 16 + columns:                                                     \
    if constexpr (lanes > 1) {                                                  \
      if (stride == 2) return filters<lanes, rows, columns, 2>(target);         \
      if (stride > 2) return filters<lanes, rows, columns, 0>(target);          \
    }                                                                           \
    if constexpr (lanes > 1 || rows == 1) filters<lanes, rows, columns, 1>(target); \
    return;
    LIGHTNING_PRUNE_CASE(1, 1)
    LIGHTNING_PRUNE_CASE(1, 2)
    LIGHTNING_PRUNE_CASE(1, 3)
    LIGHTNING_PRUNE_CASE(1, 4)
    LIGHTNING_PRUNE_CASE(1, 5)
    LIGHTNING_PRUNE_CASE(1, 6)
    LIGHTNING_PRUNE_CASE(1, 7)
    LIGHTNING_PRUNE_CASE(1, 8)
    LIGHTNING_PRUNE_CASE(1, 9)
    LIGHTNING_PRUNE_CASE(1, 10)
    LIGHTNING_PRUNE_CASE(1, 11)
    LIGHTNING_PRUNE_CASE(1, 12)
    LIGHTNING_PRUNE_CASE(1, 13)
    LIGHTNING_PRUNE_CASE(1, 14)
    LIGHTNING_PRUNE_CASE(2, 1)
    LIGHTNING_PRUNE_CASE(2, 2)
    LIGHTNING_PRUNE_CASE(2, 3)
    LIGHTNING_PRUNE_CASE(2, 4)
    LIGHTNING_PRUNE_CASE(2, 5)
    LIGHTNING_PRUNE_CASE(2, 6)
    LIGHTNING_PRUNE_CASE(2, 7)
#undef LIGHTNING_PRUNE_CASE
  }
}

// Where the results of a tile go, of each row and lane, and how many of a flat tile there are.
int64_t Plan::place(const Task& task, const Tile& tile, int64_t* places) const {
  const Shape& s = shape_;
  const int64_t image = s.outputs * s.out_height * s.out_width, lanes = settings_.lanes;
  if (flat_) {
    places[0] = task.strip * image + tile.column * lanes;
    return std::min(tile.columns * lanes, s.out_width - tile.column * lanes);
  }
  if (s.beside) {
    for (int64_t v = 0; v < tile.rows * tile.columns; ++v) {
      const int64_t row = tile.row + v / tile.columns, column = tile.column + v % tile.columns;
      const int64_t pixel = row * (s.out_width / s.beside) + column / s.beside;
      places[v] = pixel * s.batch * s.beside + task.strip + column % s.beside * lanes;
    }
    return 0;
  }
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t strip = task.strip + l, row = strip % settings_.strips * strip_rows_ + tile.row + r;
      places[r * lanes + l] = l < task.strips && row < s.out_height
                                  ? strip / settings_.strips * image + row * s.out_width + tile.column
                                  : -1;
    }
  return 0;
}

void Plan::work(const Task& task, const float* input, float* output) const {
  const Shape& s = shape_;
  const int64_t largest = settings_.lanes * settings_.rows * settings_.columns;
  static thread_local std::vector<float> memory;
  const int64_t panel_size = settings_.channels * channel_, sums_size = task.tiles * s.outputs * largest;
  const size_t needed = static_cast<size_t>(16 + panel_size + sums_size + s.width);
  if (memory.size() < needed) memory.assign(needed, 0.0f);
  float* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16;
  float* sums = panel + panel_size;
  float* zeros = sums + sums_size;
  if (s.pad_y > 0) std::fill(zeros, zeros + s.width, 0.0f);
  const Tile first = tile(task.first_tile);
  int64_t places[std::max(2 * kWidest, kMostVectors)];
  for (const Block& block : blocks_) {
    pack(input, task, block, panel, zeros);
    for (int64_t i = 0; i < task.tiles; ++i) {
      const Tile t = tile(task.first_tile + i);
      const int64_t length = s.linear ? 0 : place(task, t, places);
      const int64_t at = flat_ ? (t.column - first.column) * step_ : (t.row - first.row) * skip_ + t.column * step_;
      const int64_t to = flat_ && !s.linear ? places[0] : 0;
      const Target target{&block, panel + at, sums + i * s.outputs * largest, output + to,
                          places, length,     task.first_output,              task.end_output};
      if (settings_.lanes == 1) dispatch<1>(t, target);
      if (settings_.lanes == 4) dispatch<4>(t, target);
      if constexpr (kWidest >= 8)
        if (settings_.lanes == 8) dispatch<8>(t, target);
      if constexpr (kWidest >= 16)
        if (settings_.lanes == 16) dispatch<16>(t, target);
    }
  }
  if (!s.linear) return;
  for (int64_t i = 0; i < task.tiles; ++i) {
    const Tile t = tile(task.first_tile + i);
    const int64_t size = t.columns * settings_.lanes, start = t.column * settings_.lanes;
    const float* mine = sums + i * s.outputs * largest + task.first_output * size;
    float* to = output + start * s.outputs + task.first_output;
    transpose<16>([&](int64_t r) { return to + r * s.outputs; }, [&](int64_t o) { return mine + o * size; },
                  task.end_output - task.first_output, std::min(size, s.width - start));
  }
}

void Plan::run(const float* input, bool rows, float* output, int64_t threads, const ParallelFor& parallel) const {
  const int64_t beside = std::max<int64_t>(1, shape_.beside), strips = shape_.batch * beside * settings_.strips;
  const int64_t together = flat_ ? 1 : settings_.lanes * beside;
  const int64_t groups = ceil_div(strips, together), bands = ceil_div(tiles_, settings_.band);
  // Where there are fewer bands than threads, threads share the filters of a band.
  const int64_t parts = std::min(shape_.outputs, ceil_div(threads, groups * bands));
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t strip = i / (bands * parts) * together, first = i / parts % bands * settings_.band;
      const Task task{strip, std::min(together, strips - strip), first, std::min(settings_.band, tiles_ - first),
                      first_output(i % parts, parts), first_output(i % parts + 1, parts), rows};
      work(task, input, output);
    }
  };
  const int64_t tasks = groups * bands * parts;
  if (threads > 1 && tasks > 1)
    parallel(tasks, some);
  else
    some(0, tasks);
}

}  // namespace lightning_prune
