"""A step of training in one call: ``forward_backward`` and the whole, ``training_step``."""

import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from torch.optim import Optimizer

from mylayers import optimizers, stock
from mylayers._extension import _C
from mylayers.sequential import FusedSequential
from mylayers.stock import Stock

__all__ = ["forward_backward", "training_step"]


class _Kind(IntEnum):
    """``Criterion::Kind`` in csrc/training.h."""

    MSE = 0
    SMOOTH_L1 = 1
    HUBER = 2
    CROSS_ENTROPY = 3
    L1 = 4
    BCE = 5
    BCE_WITH_LOGITS = 6
    NLL = 7
    KL_DIV = 8
    KL_DIV_OF_LOGS = 9


# What the extension is told of a loss: kind, reduction, beta or delta, the class left out.
_Loss = tuple[_Kind, int, float, int]
_MEAN, _SUM = map(_reduction.get_enum, ("mean", "sum"))
_REDUCTIONS = {"mean": _MEAN, "sum": _SUM}
# A mean of nn.KLDivLoss warns. The other number is Criterion::kBatchMean in csrc/training.h.
_REDUCTIONS_OF_KL_DIV = {"sum": _SUM, "batchmean": 3}

_State = Mapping[str, Any]
_Rule = tuple[_Kind, float, int] | None
_is_compiling = torch.compiler.is_compiling
_REFUSED = _C.REFUSED


def _is_number(value: object) -> bool:
    return type(value) is float or stock.is_index(value)


# Each is given the state of a module of the class.


def _smooth_l1(own: _State) -> _Rule:
    beta: Any = own.get("beta")
    if not _is_number(beta) or beta < 0:
        return None
    return (_Kind.SMOOTH_L1, beta, 0) if beta else (_Kind.L1, 0.0, 0)


def _huber(own: _State) -> _Rule:
    delta: Any = own.get("delta")
    return (_Kind.HUBER, delta, 0) if _is_number(delta) else None


def _has_no_weights(own: _State) -> bool:
    return own.get("_buffers") in ({"weight": None}, {"weight": None, "pos_weight": None})


def _nll(own: _State) -> _Rule:
    ignored = own.get("ignore_index")
    if not _has_no_weights(own) or not stock.is_index(ignored):
        return None
    return _Kind.NLL, 0.0, ignored


def _cross_entropy(own: _State) -> _Rule:
    found = _nll(own) if own.get("label_smoothing") == 0 else None
    return found and (_Kind.CROSS_ENTROPY, *found[1:])


def _kl_div(own: _State) -> _Rule:
    kinds = {False: _Kind.KL_DIV, True: _Kind.KL_DIV_OF_LOGS}
    of_logs = own.get("log_target")
    return (kinds[of_logs], 0.0, 0) if type(of_logs) is bool else None


_MODULES: dict[Any, Callable[[_State], _Rule]] = {
    nn.MSELoss: lambda _: (_Kind.MSE, 0.0, 0),
    nn.SmoothL1Loss: _smooth_l1,
    nn.HuberLoss: _huber,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.L1Loss: lambda _: (_Kind.L1, 0.0, 0),
    nn.BCELoss: lambda own: (_Kind.BCE, 0.0, 0) if _has_no_weights(own) else None,
    nn.BCEWithLogitsLoss: lambda own: (
        (_Kind.BCE_WITH_LOGITS, 0.0, 0) if _has_no_weights(own) else None
    ),
    nn.NLLLoss: _nll,
    nn.KLDivLoss: _kl_div,
}
_STOCKS = {cls: Stock(cls()) for cls in _MODULES}
_ATTRIBUTES = ("reduction", "beta", "delta", "ignore_index", "label_smoothing", "log_target")
_FUNCTIONS: dict[Callable[..., Tensor], _Loss] = {
    F.mse_loss: (_Kind.MSE, _MEAN, 0.0, 0),
    F.smooth_l1_loss: (_Kind.SMOOTH_L1, _MEAN, 1.0, 0),
    F.huber_loss: (_Kind.HUBER, _MEAN, 1.0, 0),
    F.cross_entropy: (_Kind.CROSS_ENTROPY, _MEAN, 0.0, -100),
    F.l1_loss: (_Kind.L1, _MEAN, 0.0, 0),
    F.binary_cross_entropy: (_Kind.BCE, _MEAN, 0.0, 0),
    F.binary_cross_entropy_with_logits: (_Kind.BCE_WITH_LOGITS, _MEAN, 0.0, 0),
    F.nll_loss: (_Kind.NLL, _MEAN, 0.0, -100),
}


def _keep(criterion: Any) -> bool:
    """Let the extension know what the criterion is, and whether it computes it; False: unknown."""
    cls = type(criterion)
    if cls is FunctionType and criterion in _FUNCTIONS:
        _C.keep_loss(criterion, (cls, 0, None), _FUNCTIONS[criterion])
        return True
    if cls not in _MODULES:
        return False
    version, difference = stock.judge(cls, _STOCKS[cls])
    own = stock.own_state(criterion)
    entries = stock.entries(own, _ATTRIBUTES, "_buffers")
    if not version or difference.name or entries is None or _STOCKS[cls].is_shadowed_by(own):
        return False
    if not all(stock.is_empty(own.get(hooks)) for hooks in stock.HOOKS):
        return False
    named, found = own.get("reduction"), _MODULES[cls](own)
    reductions = _REDUCTIONS_OF_KL_DIV if cls is nn.KLDivLoss else _REDUCTIONS
    reduction = reductions.get(named) if type(named) is str else None
    loss = (found[0], reduction, *found[1:]) if found and reduction is not None else None
    _C.keep_loss(criterion, (cls, version, entries), loss)
    return True


def _needs_no_graph(network: nn.Module) -> bool:
    """Whether it is one of ours, and neither Dynamo nor compiled autograd takes its graph."""
    if not isinstance(network, FusedSequential) or _is_compiling():
        return False
    module = sys.modules.get("torch._dynamo.compiled_autograd")  # which may not be imported yet
    return module is None or not getattr(module, "compiled_autograd_enabled", False)


def forward_backward(
    network: nn.Module, criterion: Callable[..., Tensor], input: Tensor, target: Tensor
) -> Tensor:
    """The loss of a network, and its gradients, added to the ``grad`` of the parameters.

    It does what these lines do, for any network and any criterion::

        loss = criterion(network(input), target)
        loss.backward()
        return loss.detach()

    Where the network is a :class:`mylayers.FusedSequential` that is one chain, on the CPU, and
    the criterion one of PyTorch's ``MSELoss``, ``L1Loss``, ``SmoothL1Loss``, ``HuberLoss``,
    ``BCELoss``, ``BCEWithLogitsLoss``, ``KLDivLoss``, ``NLLLoss`` and ``CrossEntropyLoss`` (classes
    as targets, no weights, no smoothing), as module or function, with a mean or a sum (a sum or
    ``"batchmean"`` of ``KLDivLoss``, as a module alone), it makes no graph and needs no engine to
    walk it: one call computes all, to the same bits. Any other criterion is called and makes its
    graph; where this has no leaf of its own, the engine walks no more than that, and the
    parameters get their gradients without it. Anything that would see the difference (hooks, an
    input or target that requires grad, a loss of the parameters themselves, transforms, autocast,
    anomaly mode, hooks on saved tensors, compiled autograd, a profiler, a parameter in two places)
    leads to the three lines.

    Args:
        network: gives the output.
        criterion: called once with output and target, or computed as such a call would; gives a
            scalar. Any callable.
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
    if _needs_no_graph(network):
        loss = _C.forward_backward(network, criterion, input, target)
        if loss is None:
            entry = _C.forward_backward if _keep(criterion) else _C.forward_backward_of_call
            loss = entry(network, criterion, input, target)
        if loss is not None and loss is not _REFUSED:
            return loss  # type: ignore[no-any-return]
    loss = criterion(network(input), target)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def training_step(
    network: nn.Module,
    criterion: Callable[..., Tensor],
    optimizer: Optimizer,
    input: Tensor,
    target: Tensor,
    *,
    max_norm: float | None = None,
) -> Tensor:
    """A whole step of training: gradients, and the optimiser's update of the parameters.

    It does what these lines do, for any network, criterion and optimiser::

        optimizer.zero_grad()
        loss = criterion(network(input), target)
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        return loss.detach()

    Where :func:`forward_backward` makes no graph and :func:`optimize` would take the optimiser,
    one call computes all, to the same bits; the optimiser need not have been optimized. With any
    other criterion the three calls that it is made of do what each can. It leaves
    parameters, their ``grad``, and the optimiser's ``state`` as those lines do and keeps nothing
    else, so that one may go from one to the other at any step.

    Args:
        network: gives the output.
        criterion: as :func:`forward_backward` takes it.
        optimizer: of the network's parameters, some of them, or others.
        input: the network's.
        target: what the criterion compares the output with.
        max_norm: the gradients' largest norm; None: no limit.

    Returns:
        the loss, a scalar without history.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, or ``max_norm`` no number.
        RuntimeError: what network, criterion, backward and step raise.

    Source:
        csrc/autograd/training.cpp, csrc/cpu/optimizers.cpp.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mylayers import FusedSequential, training_step
        >>> net = FusedSequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> x, y = torch.rand(16, 4), torch.rand(16, 1)
        >>> losses = [training_step(net, nn.MSELoss(), optimizer, x, y) for _ in range(50)]
        >>> bool(losses[-1] < losses[0])
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "training_step: optimizer must be a torch.optim.Optimizer; "
            f"got {type(optimizer).__name__}"
        )
    if not isinstance(max_norm, float | int | None):
        raise TypeError(
            f"training_step: max_norm must be a number or None; got {type(max_norm).__name__}"
        )
    if max_norm is None and _needs_no_graph(network) and optimizers.takes(optimizer):
        done = _C.training_step(network, criterion, optimizer, input, target)
        if done is None and _keep(criterion) and optimizers.keep(optimizer):
            done = _C.training_step(network, criterion, optimizer, input, target)
        if type(done) is Tensor:
            optimizers.note(optimizer)
            return done
        if type(done) is tuple:
            optimizer.step()
            return done[0]  # type: ignore[no-any-return]
    optimizers.zero_grad(optimizer)
    loss = forward_backward(network, criterion, input, target)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    optimizers.step(optimizer)
    return loss
