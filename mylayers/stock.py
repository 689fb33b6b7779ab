"""When a module is computed as a stock layer is: what its class and its state may hold.

Of some classes (:class:`Stock`) it is known what a call of an instance computes. A call reads
names: ``forward``, ``weight``, ``_forward_hooks``; none but those that the class, its bases and an
instance have. So another class or instance is called alike if it has those names from nowhere
else. The rule is closed: it does not ask for known ways to change a layer, it lets pass

- classes whose metaclass is ``type`` or ``abc.ABCMeta``;
- in a subclass, names that the stock class does not have, and of its names the ``HARMLESS``, which
  construct, show, move or save a module;
- in an instance's ``__dict__`` its own attributes, and names that the stock class does not have;
- of the stock classes themselves, what they were when this was imported.

All else runs by itself. What was found is handed to the extension (csrc/python/plans.h) as
*entries*: the keys of a ``__dict__`` in their order, and what each value must be. It compares them
at each call.
"""

import abc
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from enum import IntEnum
from types import GetSetDescriptorType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from mylayers._extension import _C

_is_compiling = torch.compiler.is_compiling

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSORS = (Tensor, nn.Parameter)
DICTIONARIES = (dict, OrderedDict)

# Of the names of a stock class, those that a call of an instance does not read.
HARMLESS = frozenset(
    """
    __init__ __new__ __init_subclass__ __class_getitem__ __set_name__ __del__
    __module__ __name__ __qualname__ __doc__ __weakref__ __slots__ __slotnames__
    __annotations__ __annotate__ __annotate_func__ __annotations_cache__ __type_params__
    __firstlineno__ __static_attributes__ __orig_bases__ __parameters__ __final__
    __abstractmethods__ _abc_impl
    __constants__ __jit_ignored_attributes__ __jit_unused_properties__ __prepare_scriptable__
    __dataclass_fields__ __dataclass_params__ __match_args__ __replace__
    __repr__ __str__ __format__ __dir__ __sizeof__ _get_name extra_repr
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__
    __setattr__ __delattr__
    __getstate__ __setstate__ __reduce__ __reduce_ex__ __getnewargs__ __getnewargs_ex__
    __copy__ __deepcopy__
    __len__ __getitem__ __setitem__ __delitem__ __contains__ __add__ __iadd__ __mul__ __rmul__
    __imul__ append extend insert pop
    reset_parameters _make_parameters from_linear to_linear
    train eval requires_grad_ zero_grad apply _apply to to_empty cpu cuda ipu xpu mtia type float
    double half bfloat16 share_memory compile
    _version call_super_init dump_patches
    state_dict load_state_dict _save_to_state_dict _load_from_state_dict get_extra_state
    set_extra_state _replicate_for_data_parallel
    parameters named_parameters buffers named_buffers modules named_modules children named_children
    register_parameter register_buffer register_module add_module
    """.split()  # noqa: SIM905
)

METACLASSES = (type, abc.ABCMeta)
# What Module.compile puts into an instance's __dict__; None means as much as its absence.
_COMPILED = "_compiled_call_impl"


class Difference(NamedTuple):
    """Where a class may compute otherwise than the stock one.

    Attributes:
        cls: that or a base of it; "" if nowhere.
        name: what it has of its own.
        is_stocks: whether it is the stock class that is not what it was.
    """

    cls: str = ""
    name: str = ""
    is_stocks: bool = False


class Stock:
    """A class, as it was when this was imported.

    Attributes:
        cls: the class.
        state: names in the ``__dict__`` of an instance.
        names: these, its parameters' and all that its classes have.
        harmless: of the names, those that a subclass or an instance may have of its own.
    """

    def __init__(
        self,
        prototype: nn.Module,
        also_harmless: Collection[str] = (),
        harmless: frozenset[str] = HARMLESS,
    ) -> None:
        self.cls = type(prototype)
        self.harmless = harmless.union(also_harmless)
        self.state = frozenset(vars(prototype))
        self._classes = {cls: dict(vars(cls)) for cls in self.cls.__mro__}
        self.names = (
            self.state
            | frozenset(prototype._parameters)
            | frozenset(prototype._buffers)
            | frozenset().union(*self._classes.values())
        )

    def difference(self, cls: type) -> Difference:
        """Where an instance of ``cls`` may compute otherwise."""
        if type(cls) not in METACLASSES:
            return Difference(cls.__name__, f"metaclass {type(cls).__name__}")
        for klass in cls.__mro__:
            was, now = self._classes.get(klass), dict(vars(klass))
            for name in {**now, **(was or {})}:
                known = name in self.names or name[:2] == "__" == name[-2:]
                same = was is not None and was.get(name) is now.get(name)
                allowed = (
                    name in self.harmless
                    # CPython's own, which it gives the first class that has none above it.
                    or (name == "__dict__" and type(now.get(name)) is GetSetDescriptorType)
                    or self._is_tracing(klass, name)
                )
                if known and not same and not allowed:
                    return Difference(klass.__name__, name, was is not None)
        return Difference()

    @staticmethod
    def _is_tracing(cls: type, name: str) -> bool:
        """Whether it is what torch.export gives all modules, to follow their calls."""
        return cls is nn.Module and name in ("__call__", "__getattr__") and _is_compiling()

    def is_shadowed_by(self, own: Mapping[str, Any]) -> str:
        """The first name in an instance's ``__dict__`` that hides a stock one's; "" if none."""
        for name, value in own.items():
            if type(name) is not str:
                return "a key that is no str"
            hides = name in self.names and name not in (self.state | self.harmless)
            if hides and (name != _COMPILED or value is not None):
                return name
        return ""


def stock_linear(cls: Callable[..., nn.Module]) -> Stock:
    """``Stock`` of a class with a weight, which draws no random number of the user's.

    (The meta device would draw none, and takes two seconds to import.)
    """
    state = torch.get_rng_state()
    try:
        return Stock(cls(1, 1, device="cpu"))
    finally:
        torch.set_rng_state(state)


# ---- classes, each state of one judged once ----------------------------------------------------

_judged: dict[tuple[Stock, int], Difference] = {}


def judge(cls: type, stock: Stock) -> tuple[int, Difference]:
    """The version of a class, and its :meth:`Stock.difference`; no class is kept for it."""
    version = _C.class_version(cls)
    if _is_compiling() or not version:
        return version, stock.difference(cls)
    found = _judged.get((stock, version))
    if found is None:
        found = stock.difference(cls)
        if _C.class_version(cls) == version:
            if len(_judged) >= 1024:
                _judged.clear()
            _judged[stock, version] = found
    return version, found


def is_index(value: object) -> TypeGuard[int]:
    """Whether it is an int, of no class of its own, that PyTorch takes."""
    return type(value) is int and -(2**63) <= value < 2**63


def own_state(module: nn.Module) -> dict[str, Any]:
    """A module's ``__dict__``, and in it those of its tensors, as they are now."""
    own = dict(module.__dict__)
    for name in ("_parameters", "_buffers"):
        if type(own.get(name)) in DICTIONARIES:
            own[name] = dict(own[name])
    return own


# ---- entries -----------------------------------------------------------------------------------


class Must(IntEnum):
    """``Entry::Must`` in csrc/python/plans.h."""

    BE_THERE = 0
    BE_THIS = 1
    BE_EMPTY = 2
    BE_FILLED = 3
    BE_WEIGHT = 4
    BE_BIAS = 5
    BE_FOREIGN = 6
    HOLD = 7
    BE_HOOKS = 8
    BE_MODULES = 9


Entries = tuple[tuple[str, int, Any], ...]
# As the extension takes it: a class, its version or 0 for any, its entries or None for any state.
Kind = tuple[type, int, Entries | None]


def _entry_of_tensor(name: str, value: Any) -> tuple[str, int, Any]:
    if value is None:
        return name, Must.BE_THIS, None
    if name not in ("weight", "bias"):
        return name, Must.BE_THERE, None
    if type(value) not in TENSORS:
        return name, Must.BE_FOREIGN, None
    return name, Must.BE_WEIGHT if name == "weight" else Must.BE_BIAS, None


def entry_of_another(name: str, value: Any) -> tuple[str, int, Any]:
    """What must stay of an attribute that is nothing to the stock class."""
    if name == _COMPILED:
        return name, Must.BE_THIS, value
    return name, Must.BE_THERE, None


def is_empty(hooks: Any) -> bool:
    """Whether it is a dictionary of none."""
    return type(hooks) in DICTIONARIES and not hooks


def entries(
    own: Mapping[str, Any],
    attributes: Collection[str] = (),
    tensors: str = "",
    hooks: bool = True,
) -> Entries | None:
    """What a module's state must stay for what was found in it to hold; None if it has odd keys.

    Args:
        own: its :func:`own_state`.
        attributes: names of what must stay the very value that it is.
        tensors: ``_parameters`` or ``_buffers``: of which tensors the types must stay.
        hooks: whether it must go on to have hooks, or none; otherwise they are only noted.
    """
    found: list[tuple[str, int, Any]] = []
    for name, value in own.items():
        if type(name) is not str:
            return None
        if name in HOOKS:
            as_it_is = Must.BE_EMPTY if is_empty(value) else Must.BE_FILLED
            found.append((name, as_it_is if hooks else Must.BE_HOOKS, None))
        elif name == tensors and type(value) is dict:
            if any(type(key) is not str for key in value):
                return None
            held = tuple(_entry_of_tensor(*item) for item in value.items())
            found.append((name, Must.HOLD, held))
        elif name in attributes:
            found.append((name, Must.BE_THIS, value))
        else:
            found.append(entry_of_another(name, value))
    return tuple(found)
