"""Fusing a model's networks and its optimiser in place: :func:`optimize`, :func:`restore`."""

import copyreg
import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic

from torch import nn
from torch.optim import Optimizer

from mylayers import optimizers
from mylayers.layers import MyLinear
from mylayers.sequential import Chain, FusedSequential, Unfused, plan
from mylayers.stock import Stock

__all__ = ["Finding", "Report", "optimize", "restore"]


@dataclass(frozen=True)
class Finding:
    """What became of one module, of consecutive children of one, or of an optimiser.

    Attributes:
        path: the module's name in the model, "" for the model itself; "(the optimizer)".
        layers: the classes it is about, joined by " + ".
        reason: why it was not fused; "" if it was.
    """

    path: str
    layers: str
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether one operator call computes these layers now."""
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What :func:`optimize` or :func:`restore` did, in the model's order; prints as a table.

    Attributes:
        findings: one for each run of layers that one call computes now, for each other child of
            its ``nn.Sequential`` that is no such container itself, and for each linear layer that
            is in none.
    """

    findings: tuple[Finding, ...]

    @property
    def fused(self) -> tuple[Finding, ...]:
        """Those that one operator call computes."""
        return tuple(finding for finding in self.findings if finding.fused)

    @property
    def unfused(self) -> tuple[Finding, ...]:
        """Those that run by themselves, with their reasons."""
        return tuple(finding for finding in self.findings if not finding.fused)

    def __str__(self) -> str:
        """The findings as a table."""
        rows = [("module", "layers", "fused")]
        for finding in self.findings:
            answer = "yes" if finding.fused else f"no: {finding.reason}"
            rows.append((finding.path or "(the model)", finding.layers, answer))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
        return "\n".join(lines)


# ---- classes -----------------------------------------------------------------------------------


class _Optimized(FusedSequential):
    """What the classes that :func:`optimize` gives to modules have in common."""

    _original: type[nn.Sequential]

    def __init_subclass__(cls) -> None:
        """The original's is for the classes that its author derives."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the original where a pickler may know that otherwise than by its name.

        cloudpickle takes classes of ``__main__`` along, which no other process finds.
        """
        cls = type(self)
        # Another thread's restore may have taken the class away since this began.
        base: Any = super(_Optimized, cls) if issubclass(cls, _Optimized) else cls
        reduced = base.__reduce_ex__(self, protocol)
        original = vars(cls).get("_original", nn.Sequential)
        if original.__module__ == "__main__" and isinstance(reduced, tuple):
            how, arguments, *rest = reduced
            if how is copyreg.__newobj__ and arguments == (cls,):  # type: ignore[attr-defined]
                return _empty, (original,), *rest
        return reduced


class OptimizedSequential(_Optimized):
    """An ``nn.Sequential`` that :func:`optimize` has fused."""

    _original = nn.Sequential


_making = threading.Lock()


def _fused_class(original: type[nn.Sequential]) -> type[_Optimized]:
    """The class for modules of ``original``, which alone keeps it alive.

    Its name says which it is, so that pickle finds it: ``Fused[package/module:Class]``.
    """
    if original is nn.Sequential:
        return OptimizedSequential
    with _making:
        for cls in type.__subclasses__(original):
            if cls.__dict__.get("_original") is original:
                return cls  # type: ignore[return-value]
        module, name = original.__module__, original.__qualname__
        attributes = {
            "_original": original,
            "__doc__": original.__doc__,
            "__module__": __name__,
            "__qualname__": f"Fused[{module.replace('.', '/')}:{name.replace('.', '/')}]",
        }
        make, bases = type(original), (_Optimized, original)
        return make("Fused" + original.__name__, bases, attributes)  # type: ignore


def __getattr__(name: str) -> Any:
    """The class that has this name; a pickle's module asks for it."""
    if name.startswith("Fused[") and name.endswith("]"):
        module, _, qualname = name[len("Fused[") : -1].partition(":")
        found: Any = importlib.import_module(module.replace("/", "."))
        for part in qualname.split("/"):
            found = getattr(found, part)
        if isinstance(found, type) and issubclass(found, nn.Sequential):
            return _fused_class(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _empty(original: type[nn.Sequential]) -> nn.Module:
    cls = _fused_class(original)
    return cls.__new__(cls)


# ---- what is to be done ------------------------------------------------------------------------


def _class_names(modules: list[nn.Module]) -> str:
    return " + ".join(type(module).__name__ for module in modules)


_STOCK_SEQUENTIAL = Stock(nn.Sequential())


def _refusal(sequence: nn.Sequential) -> str:
    """Why its class stays; "" if it may be changed."""
    cls = type(sequence)
    difference = _STOCK_SEQUENTIAL.difference(cls)
    if difference.name.startswith("metaclass "):
        return f"{cls.__name__} has the {difference.name}"
    if difference.name:
        return f"{cls.__name__} overrides Sequential.{difference.name}"
    if "__final__" in vars(cls):
        return f"{cls.__name__} is final"
    for base in cls.__mro__:
        if "__init_subclass__" in vars(base) and base not in _WITHOUT_SAY:
            return f"{base.__name__} decides on its subclasses in __init_subclass__"
    shadow = _STOCK_SEQUENTIAL.is_shadowed_by(vars(sequence))
    if shadow:
        return f"its {shadow} was replaced"
    if type(vars(sequence).get("_modules")) is not dict:
        return "its children are not in a dict"
    return ""


# Whose __init_subclass__ has nothing to say against a subclass.
_WITHOUT_SAY = (object, Generic)


class _Changes:
    """Classes of modules, changed one after another, and all back if that ends in an exception."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, type]] = []

    def __enter__(self) -> "_Changes":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is not None:
            for module, cls in reversed(self._done):
                _set_class(module, cls)

    def make(self, module: nn.Sequential) -> str:
        """Give a module its fused class; why it cannot have it, or ""."""
        before = type(module)
        self._done.append((module, before))
        try:
            cls = _fused_class(before)
            module.__class__ = cls
            refusal = "" if type(module) is cls else "its class stays what it is"
        except Exception as e:
            refusal = f"its class cannot be changed: {type(e).__name__}: {e}"
        if refusal and type(module) is not before:
            _set_class(module, before)
        return refusal


# Past what a class has to say on setting attributes: to give back what was there is no change.
_set_class = vars(object)["__class__"].__set__


def _optimize_sequence(path: str, sequence: nn.Sequential, changes: _Changes) -> Iterator[Finding]:
    names, children = list(sequence._modules), list(sequence._modules.values())
    parts = plan(children)
    if not any(isinstance(part, Chain) and part.saves_calls for part in parts):
        return
    if not isinstance(sequence, FusedSequential):
        refusal = _refusal(sequence) or changes.make(sequence)
        if refusal:
            yield Finding(path, type(sequence).__name__, refusal)
            return
    place = 0
    for part in parts:
        if isinstance(part, Chain):
            stop = part.children.stop
            yield Finding(path, _class_names(children[place:stop]))
            place = stop
        else:
            if not isinstance(children[place], nn.Sequential):  # which has findings of its own
                child_path = f"{path}.{names[place]}" if path else names[place]
                yield Finding(child_path, type(children[place]).__name__, part.reason)
            place += 1


def _optimize(model: nn.Module, changes: _Changes) -> Iterator[Finding]:
    reported: set[int] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential):
            for finding in _optimize_sequence(path, module, changes):
                reported.update(map(id, module._modules.values()))
                yield finding
        elif isinstance(module, nn.Linear | MyLinear) and id(module) not in reported:
            (alone,) = plan([module])
            outside = "it is not in an nn.Sequential that fuses"
            reason = alone.reason if isinstance(alone, Unfused) else outside
            yield Finding(path, type(module).__name__, reason)


# ---- the functions -----------------------------------------------------------------------------


def _check(name: str, model: nn.Module, optimizer: Optimizer | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"{name}: optimizer must be a torch.optim.Optimizer or None; "
            f"got {type(optimizer).__name__}"
        )


def optimize(model: nn.Module, optimizer: Optimizer | None = None) -> Report:
    r"""Fuse runs of layers in every ``nn.Sequential`` of a model, and an optimiser, in place.

    Each ``nn.Sequential`` at any depth, the model itself included, that holds layers which
    :class:`mylayers.FusedSequential` fuses becomes one, by a change of its class alone: children,
    parameters, buffers, hooks, names and the training mode stay the objects they are, so that
    optimisers, tied weights and checkpoints stay valid, in both directions. Other modules, and
    what their ``forward`` computes, are left alone, and so is a container that does more than
    ``nn.Sequential`` does, or will not have its class changed: a row says why. After an exception
    nothing is changed.

    ``step()`` and ``zero_grad()`` of an optimiser run as one call each, to the bits of its default
    implementation (a NaN is a NaN, whatever its own bits). It must be a ``torch.optim.SGD``,
    ``Adam``, ``AdamW``, ``RMSprop`` or ``Adagrad`` and no subclass; its class changes to one of
    ours, derived from that, and its ``state``, ``param_groups``, hooks, schedulers and checkpoints
    stay what they are. A step is the stock class's own where that does more, or something else:
    the first of each parameter, with a closure or hooks, other dtypes, devices and layouts than
    dense float32 and float64 on the CPU, options that are tensors, ``foreach``, ``fused``,
    ``capturable`` and ``differentiable``, under profilers, modes and compilers. Copies of it, by
    pickle too, are of the stock class.

    Args:
        model: any module.
        optimizer: one of its parameters, or None.

    Returns:
        A report of what was fused, and what was not and why; ``print(report)`` shows a table.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``optimizer`` no ``torch.optim.Optimizer``.

    Source:
        mylayers/optimization.py and optimizers.py; which layers are fused, and when, is
        :class:`mylayers.FusedSequential`'s.

    Example:
        >>> from torch import nn
        >>> import mylayers
        >>> policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 2))
        >>> print(mylayers.optimize(policy))
        module       layers         fused
        (the model)  Linear + Tanh  yes
        2            LayerNorm      no: LayerNorm has no fused kernel
        (the model)  Linear         yes
    """
    _check("optimize", model, optimizer)
    with _Changes() as changes:
        findings = tuple(_optimize(model, changes))
        if optimizer is not None:
            name = type(optimizer).__name__
            findings += (Finding("(the optimizer)", name, optimizers.fuse(optimizer)),)
        return Report(findings)


def restore(model: nn.Module, optimizer: Optimizer | None = None) -> tuple[str, ...]:
    r"""Undo :func:`optimize`, in place.

    It takes the classes that ``optimize`` gave and no others: where another has been put on one of
    them since, as ``fully_shard`` does, the module keeps it.

    Args:
        model: any module, optimized or not.
        optimizer: one that was optimized, or not, or None.

    Returns:
        The names of the modules that have their own class again, "" being the model.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``optimizer`` no ``torch.optim.Optimizer``.

    Source:
        mylayers/optimization.py.

    Example:
        >>> from torch import nn
        >>> import mylayers
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> report = mylayers.optimize(model)
        >>> mylayers.restore(model), type(model)
        (('',), <class 'torch.nn.modules.container.Sequential'>)
    """
    _check("restore", model, optimizer)
    if optimizer is not None:
        optimizers.restore(optimizer)
    restored = []
    for path, module in list(model.named_modules()):
        original = vars(type(module)).get("_original")
        if isinstance(module, _Optimized) and original is not None:
            _set_class(module, original)
            restored.append(path)
    return tuple(restored)
