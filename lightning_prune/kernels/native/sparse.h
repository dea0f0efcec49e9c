// Sparse convolutions and linear layers on the CPU.
//
// The input is copied, a block of channels at a time, into a panel in which every weight that is left finds what it
// multiplies at `offset + position`, for all positions of a tile of outputs at once. The outputs of one filter in a
// tile (`vectors` registers of `lanes` numbers) stay in registers while the filter's weights of the block go by, and
// what a tile needs of the panel stays in the first-level cache while all filters go by.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace lightning_prune {

// Numbers of the widest vector.
#if defined(__AVX512F__)
constexpr int kWidest = 16;
#elif defined(__AVX__)
constexpr int kWidest = 8;
#else
constexpr int kWidest = 4;
#endif

// Calls its second argument with ranges that together cover [0, tasks).
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t, int64_t)>&)>;

// One layer call. A linear layer has images of one pixel and a window of one.
struct Shape {
  bool linear;
  int64_t batch, inputs, height, width;
  int64_t outputs, out_height, out_width;
  int64_t window_y, window_x, stride_y, stride_x, pad_y, pad_x, dilate_y, dilate_x;
};

// The weights that are left, filter by filter: `starts[outputs + 1]` says where each filter's begin; `taps` counts
// through input channel, window row and window column, the last one fastest.
struct Weights {
  const int64_t* starts;
  const int64_t* taps;
  const float* values;
  const float* bias;  // [outputs] or null
};

// How a call is cut up.
struct Settings {
  int64_t lanes;     // numbers of a vector: 1, 4, 8 or 16, at most `kWidest`
  int64_t vectors;   // of a tile, 1 to 14
  int64_t copies;    // 1: one copy of the input, read unaligned; 2: one per column of the window, all reads aligned
  int64_t strips;    // that an image is cut into, of equally many rows
  int64_t side;      // strips side by side in a row of the panel
  int64_t channels;  // of a block
  int64_t band;      // tiles that the panel is filled for at once
};

class Plan {
 public:
  Plan(const Shape& shape, const Weights& weights, bool relu, const Settings& settings);
  // Contiguous tensors; `residual`, of the output's shape, is added before the rectifier unless it is null.
  void run(const float* input, const float* residual, float* output, int64_t threads, const ParallelFor& parallel) const;
  const Settings& settings() const { return settings_; }

 private:
  struct Filter {  // its weights in a block
    int32_t output, begin, count, share;
    bool first, last;
  };
  struct Block {  // of input channels, with the filters that have weights there
    std::vector<int32_t> channels;
    std::vector<Filter> filters;
  };
  struct Source {  // what of the input a plane holds: every stride-th row and column from these ones on
    int64_t row, column;
    int64_t low, high;  // columns of the plane between the paddings
  };
  struct Shifted {  // a plane whose columns are those of a source, from a place on
    int64_t source, shift;
  };
  struct Piece {  // of a tile: outputs that lie side by side in the output tensor
    int32_t from, length, strip;
    int64_t to;
  };
  struct Task {
    int64_t strip, strips, first_tile, tiles, part, parts;
  };

  void lay_out();
  void cut_blocks(const Weights& weights, const std::vector<bool>& alive);
  void cut_pieces();
  void pack(const float* input, const Task& task, const Block& block, float* panel, float* stage) const;
  void pack_flat(const float* input, const Task& task, const Block& block, float* panel) const;
  void pack_rows(const float* input, const Task& task, const Source& source, int64_t first, int64_t rows, float* to,
                 int64_t row_step, int64_t strip_step, bool margins) const;
  void work(const Task& task, const float* input, const float* residual, float* output) const;
  template <int lanes>
  void tile(int64_t vectors, const Task& task, int64_t tile, const Block& block, const float* panel, float* sums,
            const float* residual, float* output) const;
  template <int lanes, int vectors>
  void filters(const Task& task, int64_t tile, const Block& block, const float* panel, float* sums,
               const float* residual, float* output) const;
  int64_t tile_start(int64_t tile) const { return tile * vectors_ / tiles_ * settings_.lanes; }
  int64_t origin(const Task& task) const;

  Shape shape_;
  bool relu_, flat_input_;
  Settings settings_;
  int64_t strip_rows_, pitch_, vectors_, tiles_, plane_, channel_, row_reach_, column_reach_;
  int64_t stage_rows_, stage_pitch_;
  std::vector<Source> sources_;
  std::vector<Shifted> planes_;  // of the panel, if they are not the sources themselves
  std::vector<int32_t> plane_of_row_, plane_of_column_;
  std::vector<Block> blocks_;
  std::vector<float> bias_, values_;
  std::vector<uint16_t> offsets_;
  std::vector<std::vector<Piece>> pieces_;
};

}  // namespace lightning_prune
