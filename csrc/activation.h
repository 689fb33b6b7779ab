// The activations: the one list, from which every place that treats all of them takes its cases.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace mylayers {

// X(enumerator, name, what its derivative is a function of, whether a microkernel applies it to
// sums in registers, its setting where none is given). One whose derivative is a function of its
// output saves nothing else (docs/decisions.md, "Save the output"). Those that are not applied in
// registers are too long to be unrolled into each microkernel, and run over c while it is in
// level-1 cache. The setting is elu's and celu's alpha and leaky_relu's slope; the others have
// none.
#define MYLAYERS_ACTIVATIONS(X)                             \
  X(kRelu, "relu", kOutput, true, kNoSetting)               \
  X(kTanh, "tanh", kOutput, false, kNoSetting)              \
  X(kSigmoid, "sigmoid", kOutput, false, kNoSetting)        \
  X(kElu, "elu", kEither, false, 1)                         \
  X(kGelu, "gelu", kInput, false, kNoSetting)               \
  X(kGeluTanh, "gelu_tanh", kInput, false, kNoSetting)      \
  X(kSilu, "silu", kInput, false, kNoSetting)               \
  X(kLeakyRelu, "leaky_relu", kEither, false, 0.01)         \
  X(kSelu, "selu", kEither, false, kNoSetting)              \
  X(kCelu, "celu", kEither, false, 1)                       \
  X(kSoftplus, "softplus", kEither, false, kNoSetting)      \
  X(kLogsigmoid, "logsigmoid", kEither, false, kNoSetting)  \
  X(kMish, "mish", kInput, false, kNoSetting)               \
  X(kHardtanh, "hardtanh", kEither, false, kNoSetting)      \
  X(kRelu6, "relu6", kEither, false, kNoSetting)            \
  X(kHardswish, "hardswish", kInput, false, kNoSetting)     \
  X(kHardsigmoid, "hardsigmoid", kInput, false, kNoSetting) \
  X(kSoftsign, "softsign", kInput, false, kNoSetting)

#define ENUMERATOR(enumerator, ...) enumerator,
enum class ActivationKind : int { kNone, MYLAYERS_ACTIVATIONS(ENUMERATOR) };
#undef ENUMERATOR

inline constexpr double kNoSetting = 0;
// Beyond them a derivative that is taken of an output of 16 bits would have no digits.
inline constexpr double kLeastSetting = 1e-4, kLargestSetting = 100;

// One of them, as "elu" or "elu(0.5)" names it.
struct Activation {
  ActivationKind kind;
  double setting;

  // NOLINTNEXTLINE(google-explicit-constructor)
  constexpr Activation(ActivationKind given) : Activation(given, default_setting(given)) {}
  constexpr Activation(ActivationKind given, double set) : kind(given), setting(set) {}
  constexpr operator ActivationKind() const { return kind; }  // NOLINT

  static constexpr double default_setting(ActivationKind kind);

  // By "using enum" g++ 12 would crash.
#define NAMED(enumerator, ...) \
  static constexpr ActivationKind enumerator = ActivationKind::enumerator;
  NAMED(kNone)
  MYLAYERS_ACTIVATIONS(NAMED)
#undef NAMED
};

// selu(x) = scale elu(x, alpha), as PyTorch has them.
inline constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
inline constexpr double kSeluScale = 1.0507009873554804934193349852946;

// Either: its output, but for a step of its own, where it is its input. There PyTorch keeps the
// input, so that callers may change the output.
enum class DerivativeOf { kOutput, kEither, kInput };

struct ActivationRow {
  std::string_view name;
  DerivativeOf derivative_of;
  bool in_registers;
  double setting;  // where none is given

  constexpr bool has_setting() const { return setting != kNoSetting; }
};

#define ROW(enumerator, name, derivative_of, in_registers, setting) \
  ActivationRow{name, DerivativeOf::derivative_of, in_registers, setting},
// In the order of ActivationKind.
inline constexpr std::array kActivations = {
    ActivationRow{"", DerivativeOf::kOutput, true, kNoSetting}, MYLAYERS_ACTIVATIONS(ROW)};
#undef ROW

constexpr const ActivationRow& row_of(ActivationKind activation) {
  return kActivations[static_cast<size_t>(activation)];
}
constexpr double Activation::default_setting(ActivationKind kind) { return row_of(kind).setting; }

// Whether backward reads what the activation is applied to, which must then be kept, in the
// tensor's dtype: the activation is taken of it as it is kept.
constexpr bool reads_input(ActivationKind activation) {
  return row_of(activation).derivative_of == DerivativeOf::kInput;
}

// The same of a step of its own.
constexpr bool step_reads_input(ActivationKind activation) {
  return row_of(activation).derivative_of != DerivativeOf::kOutput;
}

}  // namespace mylayers
