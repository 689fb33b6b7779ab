// The activations: the one list, from which every place that treats all of them takes its cases.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace mylayers {

// X(enumerator, name, what its derivative is a function of, whether a microkernel applies it to
// sums in registers). One whose derivative is a function of its output saves nothing else
// (docs/decisions.md, "Save the output"). The others are too long to be unrolled into each
// microkernel, and run over c while it is in level-1 cache.
#define MYLAYERS_ACTIVATIONS(X)          \
  X(kRelu, "relu", kOutput, true)        \
  X(kTanh, "tanh", kOutput, false)       \
  X(kSigmoid, "sigmoid", kOutput, false) \
  X(kElu, "elu", kOutput, false)         \
  X(kGelu, "gelu", kInput, false)        \
  X(kGeluTanh, "gelu_tanh", kInput, false)

#define ENUMERATOR(enumerator, name, derivative_of, in_registers) enumerator,
enum class Activation : int { kNone, MYLAYERS_ACTIVATIONS(ENUMERATOR) };
#undef ENUMERATOR

enum class DerivativeOf { kOutput, kInput };

struct ActivationRow {
  std::string_view name;
  DerivativeOf derivative_of;
  bool in_registers;
};

#define ROW(enumerator, name, derivative_of, in_registers) \
  ActivationRow{name, DerivativeOf::derivative_of, in_registers},
// In the order of Activation.
inline constexpr std::array kActivations = {
    ActivationRow{"", DerivativeOf::kOutput, true}, MYLAYERS_ACTIVATIONS(ROW)};
#undef ROW

constexpr const ActivationRow& row_of(Activation activation) {
  return kActivations[static_cast<size_t>(activation)];
}
// Whether backward reads what the activation is applied to, which must then be kept, in the
// tensor's dtype: the activation is taken of it as it is kept.
constexpr bool reads_input(Activation activation) {
  return row_of(activation).derivative_of == DerivativeOf::kInput;
}

}  // namespace mylayers
