// mylayers.freeze: a network's values as they were, packed for this machine, and calls of them.
#pragma once

#include <memory>
#include <vector>

#include "sequential.h"

namespace mylayers {

// Never changes once it is made, so that any number of threads may call it.
class MYLAYERS_API Frozen {
 public:
  // Copies the parameters. RuntimeError where they are not for CPU kernels, or do not fit together.
  Frozen(std::string_view program, at::TensorList parameters);
  Frozen(const Frozen&) = delete;
  Frozen& operator=(const Frozen&) = delete;
  ~Frozen();

  // As they were packed: another Frozen may be made of them.
  const Program& program() const { return *program_; }
  at::TensorList parameters() const { return parameters_; }
  at::ScalarType dtype() const { return parameters_.front().scalar_type(); }
  int64_t work_per_row() const { return work_per_row_; }  // multiply-adds

  // Whether it is linear layers alone, which take (..., in_units) to (..., units).
  bool is_layers() const { return layers_ != nullptr; }
  int64_t in_units() const { return in_units_; }
  int64_t units() const { return units_; }
  // Of those: rows of x, contiguous or `row` apart, to contiguous ones of out.
  void run(int64_t rows, const void* x, int64_t row, void* out) const;

  // Any program, of a dense CPU tensor of its dtype, whatever modes the thread is in.
  at::Tensor operator()(const at::Tensor& input) const;

 private:
  struct Layers;

  std::unique_ptr<const Program> program_;
  std::vector<at::Tensor> parameters_;
  std::unique_ptr<const Layers> layers_;
  int64_t work_per_row_ = 0, in_units_ = 0, units_ = 0;
};

}  // namespace mylayers
