"""What several test files use: a watch on operator calls, ways to copy a module."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """The mylayers operators that reach the backend, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "mylayers":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def masks(self) -> list[list[bool]]:
        """Of each backward of a layer: the gradients asked for, of input, weight and bias."""
        backward = ("linear_act_backward", "sequential_backward")
        masks = [list(args[-1]) for name, args in self.seen if name in backward]
        return [mask if len(mask) == 3 else [*mask, False] for mask in masks]


def through_a_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Of a whole module, parameters and buffers included.
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_a_file,
}
