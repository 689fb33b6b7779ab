"""``forward_backward``: the forward, loss and backward of a training step in one call."""

from collections.abc import Callable
from enum import IntEnum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from mylayers._extension import _C
from mylayers.sequential import FusedSequential

__all__ = ["forward_backward"]


class _Kind(IntEnum):
    """``Criterion::Kind`` in csrc/training.h."""

    MSE = 0
    SMOOTH_L1 = 1
    HUBER = 2
    CROSS_ENTROPY = 3


# What the extension is told of a loss: kind, reduction, beta or delta, the class left out.
_Loss = tuple[_Kind, int, float, int]
_MEAN, _SUM = map(_reduction.get_enum, ("mean", "sum"))
_REDUCTIONS = {"mean": _MEAN, "sum": _SUM}


def _smooth_l1(loss: nn.SmoothL1Loss) -> tuple[_Kind, float, int] | None:
    return (_Kind.SMOOTH_L1, loss.beta, 0) if loss.beta > 0 else None  # 0: PyTorch's l1_loss


def _cross_entropy(loss: nn.CrossEntropyLoss) -> tuple[_Kind, float, int] | None:
    if loss.weight is not None or loss.label_smoothing != 0:
        return None
    return _Kind.CROSS_ENTROPY, 0.0, loss.ignore_index


_MODULES: dict[Any, Callable[[Any], tuple[_Kind, float, int] | None]] = {
    nn.MSELoss: lambda _: (_Kind.MSE, 0.0, 0),
    nn.SmoothL1Loss: _smooth_l1,
    nn.HuberLoss: lambda loss: (_Kind.HUBER, loss.delta, 0),
    nn.CrossEntropyLoss: _cross_entropy,
}
_FORWARDS = {cls: cls.forward for cls in _MODULES}
_FUNCTIONS: dict[Callable[..., Tensor], _Loss] = {
    F.mse_loss: (_Kind.MSE, _MEAN, 0.0, 0),
    F.smooth_l1_loss: (_Kind.SMOOTH_L1, _MEAN, 1.0, 0),
    F.huber_loss: (_Kind.HUBER, _MEAN, 1.0, 0),
    F.cross_entropy: (_Kind.CROSS_ENTROPY, _MEAN, 0.0, -100),
}


def _known(criterion: Any) -> _Loss | None:
    cls = type(criterion)
    if cls is FunctionType:
        return _FUNCTIONS.get(criterion)
    rule = _MODULES.get(cls)
    if rule is None or cls.forward is not _FORWARDS[cls]:
        return None
    reduction, found = _REDUCTIONS.get(criterion.reduction), rule(criterion)
    return None if reduction is None or found is None else (found[0], reduction, *found[1:])


def forward_backward(
    network: nn.Module, criterion: Callable[..., Tensor], input: Tensor, target: Tensor
) -> Tensor:
    """The loss of a network, and its gradients, added to the ``grad`` of the parameters.

    It does what these lines do, for any network and any criterion::

        loss = criterion(network(input), target)
        loss.backward()
        return loss.detach()

    Where the network is a :class:`mylayers.FusedSequential` that is one chain, on the CPU, and
    the criterion one of PyTorch's ``MSELoss``, ``SmoothL1Loss``, ``HuberLoss`` and
    ``CrossEntropyLoss`` (classes as targets, no weights, no smoothing), as module or function, with
    a mean or a sum, it makes no graph and needs no engine to walk it: one call computes all, to
    the same bits. Anything that would see the graph (hooks, an input or target that requires
    grad, transforms, autocast, anomaly mode, a profiler, a parameter in two places) leads to the
    three lines.

    Args:
        network: gives the output.
        criterion: called with output and target, gives a scalar.
        input: the network's.
        target: what the criterion compares the output with.

    Returns:
        the loss, a scalar without history.

    Raises:
        RuntimeError: what network, criterion and backward raise.

    Source:
        csrc/autograd/training.cpp.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mylayers import FusedSequential, forward_backward
        >>> net = FusedSequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x, y = torch.rand(16, 4), torch.rand(16, 1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = forward_backward(net, nn.MSELoss(), x, y)
        ...     optimizer.step()
        >>> loss.requires_grad
        False
    """
    if isinstance(network, FusedSequential) and not torch.compiler.is_compiling():
        known = _known(criterion)
        if known is not None:
            module = criterion if isinstance(criterion, nn.Module) else None
            loss = _C.forward_backward(network, module, known, input, target)
            if loss is not NotImplemented:
                return loss  # type: ignore[no-any-return]
    loss = criterion(network(input), target)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
