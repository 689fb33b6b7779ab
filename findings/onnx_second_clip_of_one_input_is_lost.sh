#!/usr/bin/env bash
# torch.onnx.export writes a model that no runtime loads, if it clamps one tensor twice.
#
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.32.0. maximum(minimum(x, 1), -1) and, of the same x,
# maximum(minimum(x, 6), 0) are exported each as Min and Max. The exporter's optimiser, which is on
# unless one says optimize=False, turns each pair into a Clip, and lets the second Clip read a value of
# the first's that has no longer an owner. The export succeeds without a warning; only the session
# says that node input "x_min_1" is no output of a previous node. One such pair is exported right, and so are both
# with optimize=False, or written as torch.clamp.
#
# Seen: optimised, two pairs: refused; one pair, or not optimised, or by clamp: loaded.
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "onnx==1.23.2" \
  "onnxscript==0.7.2" "onnxruntime==1.32.0"

cat >"$folder/clips.py" <<'PYTHON'
import warnings

import onnxruntime
import torch

warnings.simplefilter("ignore")


class Clipped(torch.nn.Module):
    def __init__(self, count, clamp):
        super().__init__()
        self.limits, self.clamp = [(-1.0, 1.0), (0.0, 6.0)][:count], clamp

    def forward(self, x):
        if self.clamp:
            return [x.clamp(*limits) for limits in self.limits]
        pairs = [(torch.tensor(low), torch.tensor(high)) for low, high in self.limits]
        return [torch.maximum(torch.minimum(x, high), low) for low, high in pairs]


def told(count, clamp=False, **options):
    x = torch.linspace(-9, 9, 7)
    module = Clipped(count, clamp)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, **options)
    try:
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    except Exception as error:
        return "refused: " + ("no owner" if "is not a graph input" in str(error) else str(error))
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    right = all(torch.equal(torch.from_numpy(a), e) for a, e in zip(outputs, module(x)))
    return "loaded and right" if right else "loaded and wrong"


print("two pairs:", told(2))
print("one pair:", told(1))
print("two pairs, not optimised:", told(2, optimize=False))
print("two clamps:", told(2, clamp=True))
PYTHON
cd "$folder"
"$folder/venv/bin/python" clips.py 2>/dev/null | tee seen
for line in "two pairs: refused: no owner" "one pair: loaded and right" \
  "two pairs, not optimised: loaded and right" "two clamps: loaded and right"; do
  grep -qx "$line" seen || { echo "no longer so: $line"; exit 1; }
done
