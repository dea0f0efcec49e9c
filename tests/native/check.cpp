// Runs layers of random shapes and settings on tensors of exactly their size, for sanitizers to watch, and compares
// the results with sums in double precision. Arguments: how many, and a seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "sparse.h"

using namespace lightning_prune;

namespace {

std::mt19937 generator;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <typename T>
T one_of(std::initializer_list<T> values) {
  return *(values.begin() + draw(0, static_cast<int64_t>(values.size()) - 1));
}

Shape random_shape() {
  Shape s{};
  s.batch = one_of<int64_t>({1, 1, 2, 3, 5, 9, 16, 17});
  s.inputs = draw(1, 20), s.outputs = draw(1, 20);
  s.height = s.width = s.out_height = s.out_width = s.window_y = s.window_x = 1;
  s.stride_y = s.stride_x = s.dilate_y = s.dilate_x = 1;
  if (draw(0, 3) == 0) {
    s.linear = true;
    s.batch = draw(1, 150);
    return s;
  }
  if (draw(0, 2) == 0) {
    s.height = s.out_height = draw(1, 20), s.width = s.out_width = draw(1, 20);
    return s;
  }
  s.window_y = draw(1, 5), s.window_x = draw(1, 5);
  s.stride_y = draw(1, 3), s.stride_x = draw(1, 3);
  s.dilate_y = draw(1, 2), s.dilate_x = draw(1, 2);
  s.pad_y = draw(0, 4), s.pad_x = draw(0, 4);
  const int64_t reach_y = (s.window_y - 1) * s.dilate_y + 1, reach_x = (s.window_x - 1) * s.dilate_x + 1;
  s.height = std::max<int64_t>(1, reach_y - 2 * s.pad_y) + draw(0, 20);
  s.width = std::max<int64_t>(1, reach_x - 2 * s.pad_x) + draw(0, 20);
  s.out_height = (s.height + 2 * s.pad_y - reach_y) / s.stride_y + 1;
  s.out_width = (s.width + 2 * s.pad_x - reach_x) / s.stride_x + 1;
  return s;
}

Settings random_settings(const Shape& s) {
  Settings t{};
  const bool pointwise = s.window_y * s.window_x * s.stride_y * s.stride_x == 1 && s.pad_y + s.pad_x == 0;
  t.woven = !s.linear && (!pointwise || draw(0, 2) == 0);
  do t.lanes = one_of<int64_t>({1, 4, 8, 16});
  while (t.lanes > kWidest || (t.woven && t.lanes == 1));
  t.rows = t.woven ? draw(1, 2) : 1;
  t.columns = draw(1, kMostVectors / t.rows);
  t.strips = t.woven ? draw(1, 20) : 1;
  t.channels = draw(1, 24);
  t.band = draw(1, 12);
  return t;
}

float random_float() { return std::normal_distribution<float>()(generator); }

bool right(const Shape& s, const Settings& t) {
  const int64_t window = s.window_y * s.window_x, taps = s.inputs * window;
  const double density = one_of<double>({0.0, 0.03, 0.2, 0.6, 1.0});
  std::vector<int64_t> starts{0}, kept;
  std::vector<float> values;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const bool empty = draw(0, 5) == 0;
    for (int64_t i = 0; i < taps; ++i)
      if (!empty && draw(0, 999) < density * 1000) kept.push_back(i), values.push_back(random_float());
    starts.push_back(static_cast<int64_t>(kept.size()));
  }
  kept.shrink_to_fit(), values.shrink_to_fit(), starts.shrink_to_fit();
  const bool rows_in = s.linear || (!t.woven && s.batch == 1 && draw(0, 1));
  // Where a number lies: at image, channel, row and column of so many channels, rows and columns.
  auto at = [&](int64_t n, int64_t c, int64_t y, int64_t x, int64_t channels, int64_t rows, int64_t columns) {
    if (!s.beside) return ((n * channels + c) * rows + y) * columns + x;
    const int64_t pixel = (c * rows + y) * (columns / s.beside) + x / s.beside;
    return ((pixel * (s.batch / t.lanes) + n / t.lanes) * s.beside + x % s.beside) * t.lanes + n % t.lanes;
  };
  const int64_t in_size = s.batch * s.inputs * s.height * s.width;
  const int64_t out_size = s.batch * s.outputs * s.out_height * s.out_width;
  const std::unique_ptr<float[]> input(new float[in_size]), output(new float[out_size]), bias(new float[s.outputs]);
  for (int64_t i = 0; i < in_size; ++i) input[i] = random_float();
  for (int64_t i = 0; i < out_size; ++i) output[i] = NAN;
  for (int64_t i = 0; i < s.outputs; ++i) bias[i] = random_float();
  const bool relu = draw(0, 1), with_bias = draw(0, 1);
  const Plan plan(s, {starts.data(), kept.data(), values.data(), with_bias ? bias.get() : nullptr}, relu, t);
  // Like threads that each take a part, in an order of their own.
  const ParallelFor backwards = [](int64_t tasks, const std::function<void(int64_t, int64_t)>& work) {
    for (int64_t end = tasks; end > 0; end -= 2) work(std::max<int64_t>(0, end - 2), end);
  };
  plan.run(input.get(), rows_in, output.get(), draw(1, 4), backwards);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t o = 0; o < s.outputs; ++o)
      for (int64_t y = 0; y < s.out_height; ++y)
        for (int64_t x = 0; x < s.out_width; ++x) {
          double sum = with_bias ? bias[o] : 0.0, magnitude = std::abs(sum);
          for (int64_t i = starts[o]; i < starts[o + 1]; ++i) {
            const int64_t c = kept[i] / window, p = kept[i] % window / s.window_x, q = kept[i] % s.window_x;
            const int64_t row = y * s.stride_y - s.pad_y + p * s.dilate_y;
            const int64_t column = x * s.stride_x - s.pad_x + q * s.dilate_x;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            const int64_t from = rows_in && !s.linear ? (row * s.width + column) * s.inputs + c
                                                      : at(n, c, row, column, s.inputs, s.height, s.width);
            const double term = double(values[i]) * input[from];
            sum += term, magnitude += std::abs(term);
          }
          if (relu && sum < 0.0) sum = 0.0;
          const double found = output[at(n, o, y, x, s.outputs, s.out_height, s.out_width)];
          if (!(std::abs(found - sum) <= 1e-6 * magnitude)) {  // also where it is NaN
            std::printf("output %ld %ld %ld %ld: %g for %g\n", long(n), long(o), long(y), long(x), found, sum);
            return false;
          }
        }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  generator.seed(static_cast<unsigned>(std::atol(arguments[2])));
  for (long i = 0, count = std::atol(arguments[1]); i < count; ++i) {
    Shape s = random_shape();
    Settings t = random_settings(s);
    if (t.woven && draw(0, 1) == 0) {  // rows, padding and dilation in vectors, as few or many lie beside each other
      s.beside = s.stride_x == 1 ? draw(1, 3) : 1, s.batch = t.lanes * draw(1, 3), t.strips = 1;
      s.width *= s.beside, s.out_width *= s.beside, s.pad_x *= s.beside, s.dilate_x *= s.beside;
    }
    if (right(s, t)) continue;
    std::printf("linear %d, %ld images of %ldx%ldx%ld to %ldx%ldx%ld, window %ldx%ld, stride %ldx%ld, padding %ldx%ld, "
                "dilation %ldx%ld; lanes %ld woven %ld beside %ld rows %ld columns %ld strips %ld channels %ld band %ld\n",
                s.linear, long(s.batch), long(s.inputs), long(s.height), long(s.width), long(s.outputs),
                long(s.out_height), long(s.out_width), long(s.window_y), long(s.window_x), long(s.stride_y),
                long(s.stride_x), long(s.pad_y), long(s.pad_x), long(s.dilate_y), long(s.dilate_x), long(t.lanes),
                long(t.woven), long(s.beside), long(t.rows), long(t.columns), long(t.strips), long(t.channels), long(t.band));
    return 1;
  }
  int refused = 0;
  const Shape s{false, 1, 2, 4, 4, 2, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 0};
  const int64_t starts[] = {0, 0, 0};
  for (const Settings& t : {Settings{1, 1, 1, 4, 1, 2, 1}, Settings{4, 0, 1, 4, 1, 2, 1}, Settings{4, 1, 3, 2, 1, 2, 1},
                            Settings{4, 1, 2, 8, 1, 2, 1}, Settings{4, 1, 1, 0, 1, 2, 1}, Settings{4, 1, 1, 4, 0, 2, 1},
                            Settings{4, 1, 1, 4, 1, 0, 1}, Settings{4, 1, 1, 4, 1, 2, 0}, Settings{5, 1, 1, 4, 1, 2, 1}})
    try {
      Plan(s, {starts, nullptr, nullptr, nullptr}, false, t);
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  Shape last = s;
  last.beside = 1;
  for (const Settings& t : {Settings{4, 1, 1, 4, 1, 2, 1}, Settings{4, 1, 1, 4, 2, 2, 1}, Settings{4, 0, 1, 4, 1, 2, 1}})
    try {
      last.batch = t.strips == 1 ? 6 : 4;  // no whole vectors, or strips that images lying so are not cut into
      Plan(last, {starts, nullptr, nullptr, nullptr}, false, t);
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  if (refused != 12) return std::printf("%d of 12 wrong settings were refused\n", refused), 1;
  std::puts("all right");
  return 0;
}
