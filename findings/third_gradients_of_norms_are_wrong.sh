#!/usr/bin/env bash
# layer_norm and batch_norm have right first and second gradients, and wrong third ones.
#
# torch 2.13.0, CPU, float64. Gradients of gradients by create_graph=True. Up to the second order
# F.layer_norm and F.batch_norm in training agree with the same norm written in single operations to
# the last digits. From the third on they return other numbers, without an error or a warning. F.rms_norm
# is right in all orders. Nested forward-mode derivatives (torch.func.jvp of a jvp) of layer_norm are
# wrong from the second order on. The second backward treats the mean and the standard deviation that
# the forward kernel saved as constants. gradcheck and gradgradcheck pass, so that a test of both shows
# nothing; networks for differential equations of third order are what meets it.
#
# Seen: layer_norm and batch_norm right, right, wrong; rms_norm right, right, right; jvp right, wrong.
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"

cat >"$folder/orders.py" <<'PYTHON'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
v = torch.randn(4, 5, dtype=torch.float64)


def norm(x, dim):
    c = x - x.mean(dim, keepdim=True)
    return c / (c.square().mean(dim, keepdim=True) + 1e-5).sqrt()


def gradients(f):
    y, found = f(x), []
    for _ in range(3):
        (y,) = torch.autograd.grad((y * v).sum(), x, create_graph=True)
        found.append(y.detach())
    return found


def tangents(f):
    def once(x):
        return torch.func.jvp(f, (x,), (v,))[1]

    return [once(x.detach()), torch.func.jvp(once, (x.detach(),), (v,))[1]]


def compare(name, found, expected):
    same = (torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(found, expected, strict=True))
    print(name, *("right" if one else "wrong" for one in same))


stock = lambda x: F.layer_norm(x, (5,))
compare("layer_norm", gradients(stock), gradients(lambda x: norm(x, 1)))
compare("batch_norm", gradients(lambda x: F.batch_norm(x, None, None, training=True)), gradients(lambda x: norm(x, 0)))
rms = lambda x: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
compare("rms_norm", gradients(lambda x: F.rms_norm(x, (5,), eps=1e-5)), gradients(rms))
compare("jvp", tangents(stock), tangents(lambda x: norm(x, 1)))
PYTHON
cd "$folder"
"$folder/venv/bin/python" orders.py | tee seen
for line in "layer_norm right right wrong" "batch_norm right right wrong" "rms_norm right right right" "jvp right wrong"; do
  grep -qx "$line" seen || { echo "no longer so: $line"; exit 1; }
done
