#!/usr/bin/env bash
# Two activations have float64 gradients of float32's precision.
#
# torch 2.13.0, CPU. The gradient of hardsigmoid between its corners is 1/6, and that of celu(x, 0.3)
# below zero is e^(x / 0.3). In float64 both come out with about eight digits: PyTorch multiplies by
# 1/6 and by 1/alpha that were rounded to float32 (an alpha whose inverse float32 holds exactly, such
# as 2, shows nothing). Their values are right to the last place, and so are the gradients of
# hardswish, elu and leaky_relu. gradcheck, whose default tolerance is 1e-6, passes all of them; who
# compares float64 gradients with a formula of their own, or checks an optimiser to 1e-12, does not.
#
# Seen: hardsigmoid 0.1666666716337204, off by 5e-09; celu off by up to 4e-08.
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"

cat >"$folder/gradients.py" <<'PYTHON'
import torch
from torch.nn import functional as F

x = torch.linspace(-2.9, 2.9, 59, dtype=torch.float64, requires_grad=True)
below = (x.detach().clamp(max=0) / 0.3).exp()
for name, function, exact in (
    ("hardsigmoid", F.hardsigmoid, torch.full_like(x, 1 / 6)),
    ("celu 0.3", lambda x: F.celu(x, 0.3), below),
    ("celu 2", lambda x: F.celu(x, 2.0), (x.detach().clamp(max=0) / 2).exp()),
    ("hardswish", F.hardswish, x.detach() / 3 + 0.5),
    ("elu 0.3", lambda x: F.elu(x, 0.3), torch.where(x > 0, 1, 0.3 * x.exp()).detach()),
):
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    off = (grad - exact).abs().max().item()
    print(name, "8 digits" if 1e-9 < off < 1e-7 else "16 digits" if off < 1e-15 else off)
PYTHON
cd "$folder"
"$folder/venv/bin/python" gradients.py | tee seen
for line in "hardsigmoid 8 digits" "celu 0.3 8 digits" "celu 2 16 digits" "hardswish 16 digits" "elu 0.3 16 digits"; do
  grep -qx "$line" seen || { echo "no longer so: $line"; exit 1; }
done
