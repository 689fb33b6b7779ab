// Updates on the CPU, a batch of elements at a time, whichever parameters they are of: the kernels
// write what a root is taken of side by side, and one call takes the roots of all.
#include "../optimizers.h"

#include <ATen/ops/empty_native.h>
#include <ATen/ops/sqrt_cpu_dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/kernels.h"

namespace mylayers {
namespace cpu {
namespace {

// Elements whose gradient, parameter and state lie in level-2 cache together.
constexpr int64_t kBatch = 1 << 14;

// ATen's own, below the dispatcher: with MKL its float32 roots are not correctly rounded on every
// processor, and the optimisers' bits are made of them.
template <class T>
class Roots {
 public:
  Roots(at::ScalarType dtype, int64_t count)
      : tensor_(at::native::empty_cpu({count}, dtype)),
        data_(static_cast<T*>(tensor_.mutable_data_ptr())) {}
  void take() { at::cpu::sqrt_(tensor_); }
  T* get() const { return data_; }

 private:
  at::Tensor tensor_;
  T* data_;
};

// One parameter's elements [begin, begin + count), whose roots stand at `roots`.
template <class T>
struct Piece {
  const Update& update;
  int64_t begin, count;
  T* roots;

  const T* gradient() const { return static_cast<const T*>(update.gradient) + begin; }
  T* parameter() const { return static_cast<T*>(update.parameter) + begin; }
  T* state(int i) const {
    return update.state[i] == nullptr ? nullptr : static_cast<T*>(update.state[i]) + begin;
  }
};

template <class T>
void before_roots(const Piece<T>& p) {
  const UpdateKernels<T>& k = kernels().updates<T>();
  if (const auto* sgd = std::get_if<SgdRule>(&p.update.rule)) {
    k.sgd(p.count, *sgd, p.gradient(), p.parameter(), p.state(0));
  } else if (const auto* adam = std::get_if<AdamRule>(&p.update.rule)) {
    k.adam_moments(
        p.count, *adam, p.gradient(), p.parameter(), p.state(0), p.state(1), p.state(2), p.roots);
  } else if (const auto* rmsprop = std::get_if<RmspropRule>(&p.update.rule)) {
    k.rmsprop_moments(
        p.count, *rmsprop, p.gradient(), p.parameter(), p.state(0), p.state(1), p.roots);
  } else {
    k.adagrad_sum(
        p.count, std::get<AdagradRule>(p.update.rule), p.gradient(), p.parameter(), p.state(0),
        p.roots);
  }
}

template <class T>
void after_roots(const Piece<T>& p) {
  const UpdateKernels<T>& k = kernels().updates<T>();
  if (const auto* adam = std::get_if<AdamRule>(&p.update.rule)) {
    k.adam(p.count, *adam, p.roots, p.state(0), p.parameter());
  } else if (const auto* rmsprop = std::get_if<RmspropRule>(&p.update.rule)) {
    k.rmsprop(p.count, *rmsprop, p.roots, p.gradient(), p.parameter(), p.state(2));
  } else if (const auto* adagrad = std::get_if<AdagradRule>(&p.update.rule)) {
    k.adagrad(p.count, *adagrad, p.roots, p.gradient(), p.parameter());
  }
}

// f(piece) for each parameter's part of the elements [begin, end), counted through all of them.
template <class T, class F>
void for_pieces(c10::ArrayRef<Update> updates, int64_t begin, int64_t end, T* roots, const F& f) {
  int64_t first = 0;
  for (const Update& u : updates) {
    const int64_t from = std::max(begin, first), to = std::min(end, first + u.count);
    if (from < to) {
      f(Piece<T>{u, from - first, to - from, roots + (from - begin)});
    }
    first += u.count;
    if (first >= end) {
      break;
    }
  }
}

template <class T>
void update_all(at::ScalarType dtype, c10::ArrayRef<Update> updates) {
  int64_t total = 0;
  bool has_roots = false;
  for (const Update& u : updates) {
    total += u.count;
    has_roots = has_roots || !std::holds_alternative<SgdRule>(u.rule);
  }
  at::parallel_for(0, total, kBatch, [&](int64_t first, int64_t last) {
    Roots<T> roots(dtype, has_roots ? std::min(kBatch, last - first) : 0);
    for (int64_t begin = first; begin < last; begin += kBatch) {
      const int64_t end = std::min(last, begin + kBatch);
      for_pieces<T>(updates, begin, end, roots.get(), before_roots<T>);
      if (has_roots) {
        roots.take();
        for_pieces<T>(updates, begin, end, roots.get(), after_roots<T>);
      }
    }
  });
}

}  // namespace
}  // namespace cpu

void update(at::ScalarType dtype, c10::ArrayRef<Update> updates) {
  TORCH_INTERNAL_ASSERT(dtype == at::kFloat || dtype == at::kDouble);
  dtype == at::kFloat ? cpu::update_all<float>(dtype, updates)
                      : cpu::update_all<double>(dtype, updates);
}

}  // namespace mylayers
