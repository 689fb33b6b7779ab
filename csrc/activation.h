#pragma once

namespace mylayers {

// Activations whose derivative is a function of their output, so that backward needs
// nothing but the output (docs/design.md).
enum class Activation : int { kNone, kRelu, kTanh, kSigmoid, kElu };

}  // namespace mylayers
