// The constants of an update, as the single-tensor functions of torch.optim hand them to ATen:
// computed in double, rounded once to the dtype of the parameter.
#pragma once

namespace mylayers {

// What becomes of a gradient before anything else.
struct GradientRule {
  bool maximize;        // negated
  double weight_decay;  // of the parameter, added to it; 0: not
};

struct SgdRule {
  GradientRule gradient;
  bool nesterov;
  double momentum, gain;  // gain: 1 - dampening
  double rate;            // -lr
};

struct AdamRule {
  GradientRule gradient;
  bool shrinks;
  double shrink;         // of the parameter beforehand: 1 - lr * weight_decay
  double mean_gain;      // 1 - beta1
  double beta2, gain;    // gain: 1 - beta2
  double root, epsilon;  // root: of 1 - beta2^step
  double rate;           // -lr / (1 - beta1^step)
};

struct RmspropRule {
  GradientRule gradient;
  double alpha, gain;  // gain: 1 - alpha
  double epsilon, momentum;
  double rate;  // -lr
};

struct AdagradRule {
  GradientRule gradient;
  double epsilon;
  double rate;  // -lr / (1 + (step - 1) * lr_decay)
};

}  // namespace mylayers
