#!/usr/bin/env bash
# ATEN_CPU_CAPABILITY lowers only a part of PyTorch.
#
# torch 2.13.0, CPU. With ATEN_CPU_CAPABILITY=default torch reports that it uses its plainest kernels,
# and its own ones (here a softmax) do change: their last bits are others than without the variable. Matrix
# products do not: they are MKL's, which never looks at that variable, and keep every bit and the widest
# vectors of the processor. Who compares "plain" builds with it, or tests a lesser processor, compares
# other things for products than for everything else.
#
# Seen: "DEFAULT" reported; softmax differs; products identical. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"

cat >"$folder/bits.py" <<'PYTHON'
import torch

torch.set_num_threads(1)
# Not from torch.randn, whose own bits the variable changes.
x = (torch.arange(257 * 300) * 7919 % 1000 - 500).div(3).view(257, 300)
print(torch.backends.cpu.get_cpu_capability())
print(x.div(300).softmax(1).view(torch.int32).flatten().tolist())
print((x @ x.t()).view(torch.int32).flatten().tolist())
PYTHON
cd "$folder"
env -u ATEN_CPU_CAPABILITY "$folder/venv/bin/python" bits.py >usual
ATEN_CPU_CAPABILITY=default "$folder/venv/bin/python" bits.py >lowered

line() { sed -n "$2p" "$1"; }
[ "$(line lowered 1)" = DEFAULT ] || { echo "the variable no longer lowers what is reported"; exit 1; }
if [ "$(line usual 1)" = DEFAULT ]; then
  echo "this processor has no better kernels: nothing to compare"
  exit 1
fi
[ "$(line usual 2)" != "$(line lowered 2)" ] || { echo "softmax is no longer lowered"; exit 1; }
[ "$(line usual 3)" = "$(line lowered 3)" ] || { echo "products are lowered now, too"; exit 1; }
echo "as stated: $(line usual 1) to $(line lowered 1), softmax differs, products keep every bit"
