"""``step`` and ``zero_grad`` of PyTorch's optimisers, as one call each.

Under :func:`mylayers.optimize` an optimiser's class changes to one of those below. Its two methods
ask the extension, and where that refuses are those of the stock class. It refuses whatever is not
as the stock classes leave it: csrc/python/optimizers.cpp looks at all that a step reads before it
writes anything.
"""

import copyreg
import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from mylayers import stock
from mylayers._extension import _C
from mylayers.stock import Must

__all__ = ["fuse", "keep", "restore", "step", "takes", "zero_grad"]


class _Method(IntEnum):
    """``Method`` in csrc/python/optimizers.cpp."""

    SGD = 0
    ADAM = 1
    RMSPROP = 2
    ADAGRAD = 3


_METHODS: dict[type[Optimizer], _Method] = {
    SGD: _Method.SGD,
    Adam: _Method.ADAM,
    AdamW: _Method.ADAM,
    RMSprop: _Method.RMSPROP,
    Adagrad: _Method.ADAGRAD,
}
# Implementations that a group may ask for in place of the default one.
_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
# What a step runs before and after it.
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
# Of the stock classes' names, those that neither step nor zero_grad reads from an instance.
_UNREAD = frozenset(("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"))
# Of the names of a class, those that no step or zero_grad reads.
_HARMLESS = stock.HARMLESS - {"zero_grad"}
# What step looks for in an instance, which the stock classes do not have.
_LOOKED_FOR = frozenset(("grad_scale", "found_inf"))

_is_compiling = torch.compiler.is_compiling
_REFUSED = _C.REFUSED
# Its streams may be captured, which Adam and RMSprop ask about in every step.
_HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None


def _prepared(cls: type[Optimizer]) -> frozenset[str]:
    """What an instance has. The class wraps its step, as for the first instance of all."""
    cls.__new__(cls)._patch_step_function()
    # The stock class's own imports Dynamo, which takes a second.
    probe = type("Probe", (cls,), {"add_param_group": lambda *_: None})
    return frozenset(vars(probe([torch.zeros(0)])))


_STATE = {cls: _prepared(cls) for cls in _METHODS}
_CLASSES = {
    cls: {klass: dict(vars(klass)) for klass in cls.__mro__ if klass is not object}
    for cls in _METHODS
}
_ORIGINALS: dict[type[Optimizer], type[Optimizer]] = {}
_set_class = vars(object)["__class__"].__set__


def _undecorated(function: Any) -> Any:
    """What torch.compile, once it was used, calls without compiling it."""
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function


def _difference(cls: type[Optimizer]) -> str:
    """What a stock class has otherwise than at import; "" if nothing."""
    inherited: dict[str, Any] = {}
    for klass, was in reversed(_CLASSES[cls].items()):
        now = dict(vars(klass))
        inherited = {**inherited, **was}
        for name in {**was, **now}:
            present = _undecorated(now.get(name))
            if present is not _undecorated(inherited.get(name)) and name not in _HARMLESS:
                return f"{klass.__name__}.{name}"
    return ""


_judged: dict[int, str] = {}


def _judge(cls: type[Optimizer], original: type[Optimizer]) -> tuple[int, str]:
    """The version of a stock class or ours, and the difference of the stock class."""
    version = _C.class_version(cls)
    if version not in _judged or not version:
        if len(_judged) >= 1024:
            _judged.clear()
        _judged[version] = _difference(original)
    return version, _judged[version]


def _shadow(cls: type[Optimizer], own: dict[str, Any]) -> str:
    """The first name in an instance's ``__dict__`` that changes a step; "" if none does."""
    for name in own:
        if type(name) is not str:
            return "a key that is no str"
        hides = name not in _STATE[cls] and any(name in names for names in _CLASSES[cls].values())
        if name in _LOOKED_FOR or (hides and name not in _UNREAD):
            return name
    return ""


def keep(optimizer: Optimizer) -> bool:
    """Let the extension know what the optimiser is; whether it is one whose step it makes."""
    cls = type(optimizer)
    original = _ORIGINALS.get(cls, cls)
    if original not in _METHODS:
        return False
    version, difference = _judge(cls, original)
    own = dict(vars(optimizer))
    if not version or difference or _shadow(original, own):
        return False
    if not all(stock.is_empty(own.get(hooks)) for hooks in _STEP_HOOKS):
        return False
    entries = tuple(
        (name, Must.BE_EMPTY if name in _STEP_HOOKS else Must.BE_THERE, None) for name in own
    )
    _C.keep_optimizer(optimizer, (cls, version, entries), _METHODS[original])
    return True


def _is_done(entry: Callable[..., object], optimizer: Optimizer, *arguments: object) -> bool:
    """Whether the extension has done what the entry does."""
    done = entry(optimizer, *arguments)
    if done is None and keep(optimizer):
        done = entry(optimizer, *arguments)
    return done is True


# ---- the optimiser of a training step, which may be of a stock class ---------------------------


def takes(optimizer: Optimizer) -> bool:
    """Whether its methods are its class's, or a scheduler's around that; asked before each call."""
    own = vars(optimizer)
    if _is_compiling() or "zero_grad" in own or ("step" in own and _cell(own["step"]) is None):
        return False
    if _HAS_ACCELERATOR and isinstance(optimizer, Adam | RMSprop):
        optimizer._accelerator_graph_capture_health_check()
    return True


def note(optimizer: Optimizer) -> None:
    """What a scheduler's function notes of a step."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def zero_grad(optimizer: Optimizer) -> None:
    """Its ``zero_grad()``, in one call if that can be."""
    if not takes(optimizer) or not _is_done(_C.optimizer_zero_grad, optimizer, True):
        optimizer.zero_grad()


def step(optimizer: Optimizer) -> None:
    """Its ``step()``, in one call if that can be."""
    if takes(optimizer) and _is_done(_C.optimizer_step, optimizer):
        note(optimizer)
    else:
        optimizer.step()


# ---- classes -----------------------------------------------------------------------------------


def _class_for(original: type[Optimizer]) -> type[Optimizer]:
    asks = _HAS_ACCELERATOR and _METHODS[original] in (_Method.ADAM, _Method.RMSPROP)

    @functools.wraps(original.step)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not (args or kwargs or _is_compiling()):
            if asks:
                self._accelerator_graph_capture_health_check()
            if _is_done(_C.optimizer_step, self):
                return None
        return original.step(self, *args, **kwargs)

    @functools.wraps(original.zero_grad)
    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        if _is_compiling() or not _is_done(_C.optimizer_zero_grad, self, set_to_none):
            original.zero_grad(self, set_to_none)

    def __reduce_ex__(self: Optimizer, protocol: Any) -> Any:  # noqa: N807
        """As the stock class: who loads it need not have mylayers."""
        del protocol
        reduced: Any = original.__reduce_ex__(self, 2)
        _, _, *rest = reduced
        return copyreg._reconstructor, (original, object, None), *rest  # type: ignore[attr-defined]

    names = {
        "step": step,
        "zero_grad": zero_grad,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": original.__doc__,
        "__module__": __name__,
        "__qualname__": f"Optimized{original.__name__}",
    }
    # By its own name, which it shows and by which profilers know it.
    return type(original.__name__, (original,), names)


OptimizedSGD = _class_for(SGD)
OptimizedAdam = _class_for(Adam)
OptimizedAdamW = _class_for(AdamW)
OptimizedRMSprop = _class_for(RMSprop)
OptimizedAdagrad = _class_for(Adagrad)

_OPTIMIZED: dict[type[Optimizer], type[Optimizer]] = {
    SGD: OptimizedSGD,
    Adam: OptimizedAdam,
    AdamW: OptimizedAdamW,
    RMSprop: OptimizedRMSprop,
    Adagrad: OptimizedAdagrad,
}
_STEPS = frozenset(cls.step for pair in _OPTIMIZED.items() for cls in pair)
_ORIGINALS.update({ours: original for original, ours in _OPTIMIZED.items()})


def _cell(wrapper: Any) -> Any:
    """Where the function that a scheduler has put in the place of a step keeps the step.

    It notes the call and calls the step that the class had when it was made. None for any other
    function, and where the step is not one of these classes'.
    """
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    if not getattr(wrapper, "_wrapped_by_lr_sched", False) or "func" not in names:
        return None
    cell = wrapper.__closure__[names.index("func")]
    return cell if cell.cell_contents in _STEPS else None


def _redirect(optimizer: Optimizer, cls: type[Optimizer]) -> bool:
    """Let the step that a scheduler has wrapped be a class's; whether that can be done."""
    wrapper: Any = vars(optimizer).get("step")
    if wrapper is None:
        return True
    cell = _cell(wrapper)
    if cell is None:
        return False
    cell.cell_contents = wrapper.__wrapped__ = cls.step
    return True


def _refusal(optimizer: Optimizer) -> str:
    cls = type(optimizer)
    if cls not in _METHODS:
        return f"{cls.__name__} is not one of {', '.join(k.__name__ for k in _METHODS)}"
    difference = _difference(cls)
    if difference:
        return f"{difference} was replaced"
    own = vars(optimizer)
    shadow = _shadow(cls, own) or ("zero_grad" if "zero_grad" in own else "")
    if shadow:
        return f"its {shadow} was replaced"
    for option in _OPTIONS:
        if any(group.get(option) for group in optimizer.param_groups):
            return f"{option} is True"
    return ""


def fuse(optimizer: Optimizer) -> str:
    """Let an optimiser's ``step`` and ``zero_grad`` run as one call each; "", or why not."""
    cls = type(optimizer)
    if cls in _ORIGINALS:
        return ""
    refusal = _refusal(optimizer)
    if refusal:
        return refusal
    if not _redirect(optimizer, _OPTIMIZED[cls]):
        return "its step was replaced"
    _set_class(optimizer, _OPTIMIZED[cls])
    return ""


def restore(optimizer: Optimizer) -> bool:
    """Undo :func:`fuse`; whether there was something to undo."""
    original = _ORIGINALS.get(type(optimizer))
    if original is None:
        return False
    _set_class(optimizer, original)
    _redirect(optimizer, original)
    return True
