"""Fusing a model's networks and its optimiser in place: :func:`optimize`, :func:`restore`."""

import copyreg
import importlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from torch import nn
from torch.optim import Optimizer

from mylayers import optimizers
from mylayers.forwards import OptimizedForward, Rewriting, has_own_forward, prepare, refusal
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


class _Optimized(nn.Module):
    """What the classes that :func:`optimize` gives to modules have in common."""

    _original: type[nn.Module]

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


class _OptimizedSequence(_Optimized, FusedSequential):
    """Of containers that only run their children."""


class _OptimizedForward(_Optimized, OptimizedForward):
    """Of modules with a forward of their own."""


class OptimizedSequential(_OptimizedSequence):
    """An ``nn.Sequential`` that :func:`optimize` has fused."""

    _original = nn.Sequential


_making = threading.Lock()


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class for modules of ``original``, which alone keeps it alive.

    Its name says which it is, so that pickle finds it: ``Fused[package/module:Class]``.
    """
    if original is nn.Sequential:
        return OptimizedSequential
    with _making:
        own_forward = has_own_forward(original)
        for cls in type.__subclasses__(original):
            if cls.__dict__.get("_original") is original:
                if own_forward:
                    _renew(cls)
                return cls
        module, name = original.__module__, original.__qualname__
        attributes: dict[str, Any] = {
            "_original": original,
            "__doc__": original.__doc__,
            "__module__": __name__,
            "__qualname__": f"Fused[{module.replace('.', '/')}:{name.replace('.', '/')}]",
        }
        bases: tuple[type, ...] = (_OptimizedSequence, original)
        if own_forward:
            attributes["_rewriting"] = Rewriting.of(original)
            bases = (_OptimizedForward, original)
            if issubclass(original, nn.Sequential):  # which super().forward then is
                bases = (*bases, FusedSequential)
        make: Any = type(original)
        return make("Fused" + original.__name__, bases, attributes)  # type: ignore[no-any-return]


def _renew(cls: Any) -> None:
    """A class of ours, where the original has got another forward."""
    rewriting = vars(cls)["_rewriting"]
    if not isinstance(rewriting, Rewriting) or not rewriting.is_current():
        if "forward" in vars(cls):
            del cls.forward
        cls._rewriting = Rewriting.of(vars(cls)["_original"])


def __getattr__(name: str) -> Any:
    """The class that has this name; a pickle's module asks for it."""
    if name.startswith("Fused[") and name.endswith("]"):
        module, _, qualname = name[len("Fused[") : -1].partition(":")
        found: Any = importlib.import_module(module.replace("/", "."))
        for part in qualname.split("/"):
            found = getattr(found, part)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return _fused_class(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _empty(original: type[nn.Module]) -> nn.Module:
    cls = _fused_class(original)
    return cls.__new__(cls)


# ---- what is to be done ------------------------------------------------------------------------


def _class_names(modules: list[nn.Module]) -> str:
    return " + ".join(type(module).__name__ for module in modules)


_STOCK_SEQUENTIAL = Stock(nn.Sequential())
_STOCK_MODULE = Stock(nn.Module())


def _refusal(module: nn.Module) -> str:
    """Why its class stays; "" if it may be changed."""
    cls = type(module)
    is_sequence = isinstance(module, nn.Sequential)
    known = _STOCK_SEQUENTIAL if is_sequence else _STOCK_MODULE
    if has_own_forward(cls):
        difference = refusal(cls)
        if difference:
            return difference
    else:
        found = known.difference(cls)
        if found.name.startswith("metaclass "):
            return f"{cls.__name__} has the {found.name}"
        if found.name:
            return f"{cls.__name__} overrides Sequential.{found.name}"
    if "__final__" in vars(cls):
        return f"{cls.__name__} is final"
    for base in cls.__mro__:
        if "__init_subclass__" in vars(base) and base not in _WITHOUT_SAY:
            return f"{base.__name__} decides on its subclasses in __init_subclass__"
    shadow = known.is_shadowed_by(vars(module))
    if shadow:
        return f"its {shadow} was replaced"
    if type(vars(module).get("_modules")) is not dict:
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

    def make(self, module: nn.Module) -> str:
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


def _rows(path: str, sequence: nn.Sequential) -> list[Finding]:
    """What becomes of its children, where it is one that fuses them."""
    names, children = list(sequence._modules), list(sequence._modules.values())
    parts = plan(children)
    if not any(isinstance(part, Chain) and part.saves_calls for part in parts):
        return []
    rows, place = [], 0
    for part in parts:
        if isinstance(part, Chain):
            stop = part.children.stop
            rows.append(Finding(path, _class_names(children[place:stop])))
            place = stop
        else:
            if not isinstance(children[place], nn.Sequential):  # which has findings of its own
                child_path = f"{path}.{names[place]}" if path else names[place]
                rows.append(Finding(child_path, type(children[place]).__name__, part.reason))
            place += 1
    return rows


def _optimize_sequence(path: str, sequence: nn.Sequential, changes: _Changes) -> list[Finding]:
    rows = _rows(path, sequence)
    if rows and not isinstance(sequence, FusedSequential):
        objection = _refusal(sequence) or changes.make(sequence)
        if objection:
            return [Finding(path, type(sequence).__name__, objection)]
    return rows


def _optimize_forward(path: str, module: nn.Module, changes: _Changes) -> "_Forward":
    """Of a module with a forward of its own."""
    cls = type(module)
    rewriting: Any = vars(cls).get("_rewriting")
    if isinstance(module, OptimizedForward):
        _fused_class(vars(cls)["_original"])  # which may have got another forward
        rewriting = vars(cls).get("_rewriting")
    else:
        objection = _refusal(module)
        if objection:
            return _Forward(reason=objection)
        rewriting = Rewriting.of(cls)
    if not isinstance(rewriting, Rewriting):
        return _Forward(reason=str(rewriting))
    search = rewriting.search(module, False)
    findings = [Finding(path, region.label) for region in search.found]
    layers = {id(layer) for region in search.found for layer in region.modules}
    is_worth = bool(findings or rewriting.search(module, True).found)
    if isinstance(module, nn.Sequential) and rewriting.calls_super():
        rows = _rows(path, module)
        is_worth = is_worth or any(row.fused for row in rows)
        findings += rows
        layers.update(map(id, module._modules.values()))
    if is_worth and not isinstance(module, OptimizedForward):
        objection = changes.make(module)
        if objection:
            return _Forward(reason=objection)
    reason = ""
    if rewriting.has_any_arguments():
        reason = (
            f"{rewriting.original.__name__}.forward takes any number of arguments, or named ones"
        )
    return _Forward(findings, layers, search.reasons, reason)


@dataclass(frozen=True)
class _Forward:
    """What became of a forward.

    Attributes:
        findings: one for each region.
        layers: ids of the modules in them.
        reasons: of other modules, why what calls them is not followed further.
        reason: why none of it is followed.
    """

    findings: Sequence[Finding] = ()
    layers: Collection[int] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(below, nn.Linear | MyLinear) for below in module.modules())


_OUTSIDE = "it is not in an nn.Sequential that fuses"


def _optimize(model: nn.Module, changes: _Changes) -> Iterator[Finding]:
    modules = list(model.named_modules())
    rows: dict[int, Sequence[Finding]] = {}
    fused: set[int] = set()
    for path, module in modules:
        if isinstance(module, nn.Sequential) and not has_own_forward(type(module)):
            rows[id(module)] = _optimize_sequence(path, module, changes)
            if rows[id(module)]:
                fused.update(map(id, module._modules.values()))
    # Behind them, as a region knows the classes of the containers in it.
    reasons: dict[int, str] = {}
    for path, module in modules:
        if _may_have_regions(module):
            forward = _optimize_forward(path, module, changes)
            rows[id(module)] = forward.findings
            fused.update(forward.layers)
            reasons.update(_reasons(module, forward))
    for _, module in modules:
        if isinstance(module, OptimizedForward):
            prepare(module)
    for path, module in modules:
        yield from rows.get(id(module), ())
        if isinstance(module, nn.Linear | MyLinear) and id(module) not in fused:
            (alone,) = plan([module])
            outside = reasons.get(id(module), _OUTSIDE)
            reason = alone.reason if isinstance(alone, Unfused) else outside
            yield Finding(path, type(module).__name__, reason)


def _reasons(module: nn.Module, forward: _Forward) -> Iterator[tuple[int, str]]:
    """Of each module that this forward may call: why it runs by itself."""
    name = vars(type(module)).get("_original", type(module)).__name__
    for child in _called_by(module):
        why = forward.reasons.get(id(child))
        if forward.reason:
            yield id(child), forward.reason
        elif why:
            yield id(child), f"{name}.forward is not followed there: {why}"
        else:
            yield id(child), f"{name}.forward has no layer to fuse it with"


def _called_by(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is not None and not _may_have_regions(child):
            yield child
            if not has_own_forward(type(child)):
                yield from _called_by(child)


def _may_have_regions(module: nn.Module) -> bool:
    cls = type(module)
    return (
        has_own_forward(cls)
        and bool(module._modules)
        and not cls.__module__.startswith("torch.")
        and _has_linear(module)
    )


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
    r"""Fuse runs of layers in a model's containers and forwards, and an optimiser, in place.

    Each ``nn.Sequential`` at any depth, the model itself included, that holds layers which
    :class:`mylayers.FusedSequential` fuses becomes one, by a change of its class alone: children,
    parameters, buffers, hooks, names and the training mode stay the objects they are, so that
    optimisers, tied weights and checkpoints stay valid, in both directions. A module with a
    ``forward`` of its own gets a class, too, whose forward is the same but for layers that are
    called one after another: these are computed in one call as long as all that the lines would
    read is what it was, and else as they are written (docs/what-a-forward-may-say.md). What cannot
    be followed, does more than its stock class does, or will not have its class changed is left
    alone: a row says why. After an exception nothing is changed.

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
        mylayers/optimization.py, forwards.py and optimizers.py; which layers are fused, and when,
        is :class:`mylayers.FusedSequential`'s.

    Example:
        >>> from torch import nn
        >>> import mylayers
        >>> policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.GroupNorm(2, 8), nn.Linear(8, 2))
        >>> print(mylayers.optimize(policy))
        module       layers         fused
        (the model)  Linear + Tanh  yes
        2            GroupNorm      no: GroupNorm has no fused kernel
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
