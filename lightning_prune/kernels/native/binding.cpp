// What Python sees of the sparse kernels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/utils/pybind.h>

#include "sparse.h"

namespace lightning_prune {
namespace {

using Sizes = std::vector<int64_t>;

class Layer {
 public:
  // `out` are the sizes of results; with `batch_last` these lie so, and inputs are brought to lie so. The order of
  // `sizes` and `settings` is that of `Shape` and `Settings`.
  Layer(bool linear, bool batch_last, const Sizes& out, const Sizes& sizes, const at::Tensor& starts,
        const at::Tensor& taps, const at::Tensor& values, const std::optional<at::Tensor>& bias, bool relu,
        const Sizes& settings)
      : batch_last_(batch_last),
        flat_(!settings.at(1)),
        out_(out),
        plan_(shape(linear, sizes),
              {starts.const_data_ptr<int64_t>(), taps.const_data_ptr<int64_t>(), values.const_data_ptr<float>(),
               bias ? bias->const_data_ptr<float>() : nullptr},
              relu,
              {settings.at(0), settings.at(1), settings.at(2), settings.at(3), settings.at(4), settings.at(5),
               settings.at(6)}) {}

  at::Tensor run(const at::Tensor& input) const {
    const bool rows = input.dim() == 2 && flat_ && !(batch_last_ && lies_last(input));
    const at::Tensor x = batch_last_ && !rows ? lying(input) : input.contiguous();
    at::Tensor y = batch_last_ ? at::empty_strided(out_, strides(out_), x.options()) : at::empty(out_, x.options());
    plan_.run(x.const_data_ptr<float>(), rows, y.mutable_data_ptr<float>(), at::get_num_threads(),
              [](int64_t tasks, const std::function<void(int64_t, int64_t)>& work) {
                at::parallel_for(0, tasks, 1, work);
              });
    return y;
  }

 private:
  static bool lies_last(const at::Tensor& x) { return x.strides().equals(strides(x.sizes().vec())); }
  static at::Tensor lying(const at::Tensor& input) {
    if (lies_last(input)) return input;
    const at::Tensor x = input.contiguous();
    at::Tensor y = at::empty_strided(x.sizes(), strides(x.sizes().vec()), x.options());
    lay_batch_last(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.size(0), x.numel() / x.size(0));
    return y;
  }
  // Of tensors whose first dimension is the last one in memory.
  static Sizes strides(const Sizes& sizes) {
    Sizes found(sizes.size(), 1);
    int64_t step = sizes[0];
    for (size_t i = sizes.size() - 1; i > 0; step *= sizes[i--]) found[i] = step;
    return found;
  }
  static Shape shape(bool linear, const Sizes& s) {
    return {linear,  s.at(0), s.at(1), s.at(2),  s.at(3),  s.at(4),  s.at(5),  s.at(6),
            s.at(7), s.at(8), s.at(9), s.at(10), s.at(11), s.at(12), s.at(13), s.at(14), s.at(15)};
  }
  bool batch_last_, flat_;
  Sizes out_;
  Plan plan_;
};

}  // namespace
}  // namespace lightning_prune

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using lightning_prune::Layer;
  using lightning_prune::Sizes;
  pybind11::class_<Layer>(module, "Layer")
      .def(pybind11::init<bool, bool, const Sizes&, const Sizes&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&, bool, const Sizes&>())
      .def("run", &Layer::run, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.attr("lanes") = lightning_prune::kWidest;
}
