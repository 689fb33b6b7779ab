#include "layers.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "activation.h"
#include "gemm_aten.h"
#include "machine/tuning.h"
#include "scratch.h"

namespace mylayers::cpu {
namespace {

// Rows that go through all layers together: those of one task of gemm.
constexpr int64_t kBlockRows = 256;
// Two blocks of wider layers would leave level-2 cache, and their products no longer wait for it.
constexpr int64_t kWidestBlock = 512;
// Rows per thread below which layers are shared by columns, as gemm does, instead of rows.
constexpr int64_t kLeastRows = 32;

}  // namespace

c10::SmallVector<LinearAndActivation, 8> linear_run_from(const Program& program, size_t first) {
  c10::SmallVector<LinearAndActivation, 8> run;
  for (size_t i = first; i < program.steps.size(); ++i) {
    const Step& step = *program.steps[i];
    if (!run.empty()) {
      const size_t before = run.back().last().value;
      if (step.inputs[0] != before || program.values[before].readers != 1) {
        break;
      }
    }
    if (const LinearStep* const linear = step.as_linear()) {
      run.push_back({linear});
      continue;
    }
    const ActivationStep* const activation = step.as_activation();
    if (!activation || run.empty() || run.back().activation ||
        run.back().linear->activation != Activation::kNone ||
        !step_reads_input(activation->activation)) {
      break;
    }
    run.back().activation = activation;
  }
  return run;
}

template <class T>
void run_layers(int64_t rows, Matrix<T> x, c10::ArrayRef<Layer<T>> layers) {
  int64_t widest = 0;
  double work = 0;
  int64_t weights = 0;  // bytes
  bool whole = false;   // PyTorch's products share rows among threads themselves
  for (const auto& layer : layers) {
    widest = std::max(widest, layer.output ? 0 : layer.units);
    weights += layer.in_units * layer.units * static_cast<int64_t>(sizeof(T));
    work += static_cast<double>(rows) * static_cast<double>(layer.in_units) *
            static_cast<double>(layer.units);
    whole = whole || is_aten_product(rows, layer.units, layer.in_units);
  }
  const auto run_rows = [&](int64_t first, int64_t count) {
    const Scratch<T> between(2 * count * widest);
    Matrix<T> in = x.at(first, 0);
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto& layer = layers[l];
      T* out = layer.output ? layer.output + first * layer.units
                            : between.get() + l % 2 * (count * widest);
      T* sums = layer.sums ? layer.sums + first * layer.units : out;
      const bool apart = layer.sums || (layer.is_step && sizeof(T) == 2);
      const Activation act = apart ? Activation(Activation::kNone) : layer.activation;
      if (count > 0 && count <= static_cast<int64_t>(layer.plans.size())) {
        gemm_planned<T>(
            layer.plans[count - 1], count, layer.units, layer.in_units, in, layer.weight,
            layer.bias, act, sums);
      } else {
        gemm<T>(
            count, layer.units, layer.in_units, in, layer.weight, layer.bias, act, sums, weights);
      }
      if (apart) {
        activate(count * layer.units, sums, layer.activation, out);
      }
      in = {out, layer.units, 1};
    }
  };
  const int64_t threads =
      work <= machine().serial_work || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (whole || widest > kWidestBlock || (threads > 1 && rows < threads * kLeastRows)) {
    run_rows(0, rows);
    return;
  }
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t mr = kernels().product<acc_t<T>>().mr;
  const int64_t block = std::min(kBlockRows, (share + mr - 1) / mr * mr);
  const int64_t blocks = rows == 0 ? 0 : (rows + block - 1) / block;
  const auto run_blocks = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      run_rows(b * block, std::min(block, rows - b * block));
    }
  };
  if (threads == 1) {
    run_blocks(0, blocks);
  } else {
    at::parallel_for(0, blocks, 1, run_blocks);
  }
}

#define INSTANTIATE(T) template void run_layers<T>(int64_t, Matrix<T>, c10::ArrayRef<Layer<T>>);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
