"""Fusing a model's networks in place, and back: :func:`optimize` and :func:`restore`."""

import copyreg
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mylayers.layers import MyLinear
from mylayers.sequential import Chain, FusedSequential, Unfused, plan

__all__ = ["Finding", "Report", "optimize", "restore"]


@dataclass(frozen=True)
class Finding:
    """What became of one module, or of consecutive children of one.

    Attributes:
        path: the module's name in the model, "" for the model itself.
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


class _Rewritten(FusedSequential):
    """Base of the classes that :func:`optimize` gives to modules; ``restore`` knows them by it."""

    _original: type[nn.Sequential]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the original's name, as a class made here has none to be found by."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        how, arguments, *rest = reduced
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]
            how, arguments = _empty, (self._original,)
        return (self._original if how is type(self) else how), arguments, *rest


def _empty(original: type[nn.Sequential]) -> nn.Module:
    cls = _rewritten(original)
    return cls.__new__(cls)


_classes: dict[type[nn.Sequential], type[_Rewritten]] = {}


def _rewritten(original: type[nn.Sequential]) -> type[_Rewritten]:
    if original not in _classes:
        bases = (_Rewritten,) if original is nn.Sequential else (_Rewritten, original)
        attributes = {"_original": original, "__doc__": original.__doc__, "__module__": __name__}
        _classes[original] = type("Fused" + original.__name__, bases, attributes)
    return _classes[original]


def _class_names(modules: list[nn.Module]) -> str:
    return " + ".join(type(module).__name__ for module in modules)


def _refusal(sequence: nn.Sequential) -> str:
    cls = type(sequence)
    for name in ("forward", "__call__", "__iter__"):
        if getattr(cls, name) is not getattr(nn.Sequential, name):
            return f"{cls.__name__} overrides Sequential.{name}"
    if "forward" in sequence.__dict__:
        return "its forward was replaced"
    return ""


def _optimize_sequence(path: str, sequence: nn.Sequential) -> Iterator[Finding]:
    names, children = list(sequence._modules), list(sequence)
    parts = plan(children)
    if not any(isinstance(part, Chain) and part.saves_calls for part in parts):
        return
    refusal = "" if isinstance(sequence, FusedSequential) else _refusal(sequence)
    if refusal:
        yield Finding(path, type(sequence).__name__, refusal)
        return
    if not isinstance(sequence, FusedSequential):
        sequence.__class__ = _rewritten(type(sequence))
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


def _optimize(model: nn.Module) -> Iterator[Finding]:
    reported: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential):
            for finding in _optimize_sequence(path, module):
                reported.update(module.children())
                yield finding
        elif isinstance(module, nn.Linear | MyLinear) and module not in reported:
            (alone,) = plan([module])
            outside = "it is not in an nn.Sequential that fuses"
            reason = alone.reason if isinstance(alone, Unfused) else outside
            yield Finding(path, type(module).__name__, reason)


def optimize(model: nn.Module) -> Report:
    r"""Fuse runs of layers in every ``nn.Sequential`` of a model, in place.

    Each ``nn.Sequential`` at any depth, the model itself included, that holds layers which
    :class:`mylayers.FusedSequential` fuses becomes one, by a change of its class alone: children,
    parameters, buffers, hooks, names and the training mode stay the objects they are, so that
    optimisers, tied weights and checkpoints stay valid, in both directions. Other modules, and
    what their ``forward`` computes, are left alone.

    Args:
        model: any module.

    Returns:
        A report of what was fused, and what was not and why; ``print(report)`` shows a table.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Source:
        mylayers/optimization.py; what is fused, and when, is :class:`mylayers.FusedSequential`'s.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be an nn.Module; got {type(model).__name__}")
    return Report(tuple(_optimize(model)))


def restore(model: nn.Module) -> tuple[str, ...]:
    r"""Undo :func:`optimize`, in place.

    Args:
        model: any module, optimized or not.

    Returns:
        The names of the modules that have their own class again, "" being the model.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be an nn.Module; got {type(model).__name__}")
    restored = []
    for path, module in list(model.named_modules()):
        if isinstance(module, _Rewritten):
            module.forget_plan()
            module.__class__ = module._original  # type: ignore[assignment]
            restored.append(path)
    return tuple(restored)
