// Sparse convolutions and linear layers on the CPU.
//
// The input is copied, a block of channels at a time, into a panel in which every weight that is left finds what it
// multiplies at `offset + position`, for all positions of a tile of outputs at once, always at a whole vector. The
// outputs of one filter in a tile (`rows * columns` registers of `lanes` numbers) stay in registers while the filter's
// weights of the block go by, and what a tile needs of the panel stays in the first-level cache while all filters go by.
//
// The numbers of a vector are neighbours in memory (flat) where pixels have no neighbours that matter: in linear layers
// and 1x1 convolutions. Otherwise (woven) they are of equal place in as many images, or strips of images, so that a step
// to the next pixel is one to the next vector. Activations may lie so that images are woven already: then rows are
// copied as they are, and results stored as they come.
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

// Vectors of the largest tile: two registers are left for the weight and for the input.
constexpr int kMostVectors = 14;

// Numbers of the largest panel, so that half an offset has 16 bits.
constexpr int64_t kMostNumbers = 2 * 65536;

// Calls its second argument with ranges that together cover [0, tasks).
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t, int64_t)>&)>;

// Brings images, `[batch, size]`, to lie with the batch last, `[size, batch]`.
void lay_batch_last(const float* from, float* to, int64_t batch, int64_t size);

// One layer call. A linear layer has images of one pixel and a window of one.
struct Shape {
  bool linear;
  int64_t batch, inputs, height, width;
  int64_t outputs, out_height, out_width;
  int64_t window_y, window_x, stride_y, stride_x, pad_y, pad_x, dilate_y, dilate_x;
  // Vectors that lie side by side for each pixel if images lie woven already: channel, row, column, image. Widths, padding
  // and dilation then count vectors, and the batch is of so many times more images. Otherwise 0.
  int64_t beside;
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
  int64_t lanes;     // numbers of a vector: 4, 8 or 16, at most `kWidest`; or 1 in flat panels
  int64_t woven;     // whether a vector is of several strips
  int64_t rows;      // of a tile, 1 or 2; flat images have only one
  int64_t columns;   // vectors of a tile side by side; with the rows at most `kMostVectors`
  int64_t strips;    // that an image is cut into, of equally many rows
  int64_t channels;  // of a block
  int64_t band;      // tiles that the panel is filled for at once
};

class Plan {
 public:
  // Throws std::invalid_argument for settings that do not fit.
  Plan(const Shape& shape, const Weights& weights, bool relu, const Settings& settings);
  // Contiguous tensors. `rows`: whether the numbers of a pixel lie side by side in the input, as in a linear layer's rows;
  // only flat images of a batch of one may lie so.
  void run(const float* input, bool rows, float* output, int64_t threads, const ParallelFor& parallel) const;

 private:
  struct Filter {  // its weights in a block
    int32_t output, begin, count;
    bool first, last;
  };
  struct Block {  // of input channels, with the filters that have weights there
    std::vector<int32_t> channels;
    std::vector<Filter> filters;
  };
  struct Task {
    int64_t strip, strips, first_tile, tiles;
    int32_t first_output, end_output;
    bool rows;
  };
  struct Tile {
    int64_t row, rows, column, columns;
  };
  struct Rows {  // of the input under a band; of `wide` vectors, `size` hold numbers, with padding `left` of them
    int64_t start, count, wide, left, size;  // the first strip's start, which may lie in the padding above
  };
  struct Target {  // of a tile
    const Block* block;
    const float* panel;
    float* sums;     // of each filter, so far
    float* output;   // of the image, or of the flat tile
    const int64_t* places;  // from there on of each row and lane, -1 for none; of each vector if images lie woven
    int64_t length;         // of flat results
    int32_t first_output, end_output;
  };

  void lay_out();
  void cut_blocks(const Weights& weights);
  int32_t first_output(int64_t part, int64_t parts) const;
  Tile tile(int64_t index) const;
  Rows rows_under(const Task& task) const;
  void pack(const float* input, const Task& task, const Block& block, float* panel, const float* zeros) const;
  void pack_flat(const float* input, const Task& task, const Block& block, float* panel) const;
  template <int lanes>
  void pack_woven(const float* input, const Task& task, const Block& block, float* panel, const float* zeros) const;
  template <int lanes>
  void pack_batch_last(const float* input, const Task& task, const Block& block, float* panel) const;
  void work(const Task& task, const float* input, float* output) const;
  int64_t place(const Task& task, const Tile& tile, int64_t* places) const;
  template <int lanes>
  void dispatch(const Tile& tile, const Target& target) const;
  template <int lanes, int rows, int columns, int stride>  // 0 for any stride
  void filters(const Target& target) const;

  Shape shape_;
  bool relu_, flat_;
  Settings settings_;
  int64_t strip_rows_;             // of outputs
  int64_t across_, down_;          // vectors of a strip's outputs
  int64_t tiles_across_, tiles_;   // of a strip
  int64_t pitch_, channel_;        // of the panel, in numbers
  int64_t step_, skip_;            // in the panel from a vector to the next one of the tile, and to the next row's
  std::vector<Block> blocks_;
  std::vector<float> bias_, values_;
  std::vector<uint16_t> offsets_;
  std::vector<int64_t> effort_;  // of all filters before each one, and of all
};

}  // namespace lightning_prune
