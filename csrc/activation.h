#pragma once

namespace mylayers {

// Activations whose derivative is a function of their output, so that backward needs
// nothing but the output (docs/decisions.md, "Save the output").
enum class Activation : int { kNone, kRelu, kTanh, kSigmoid, kElu };

}  // namespace mylayers
