"""``freeze``: a network's values as they are, packed for this machine, to be served.

What a network computes is decided as for :class:`mylayers.FusedSequential` (sequential.py). A call
goes into the extension (csrc/python/frozen.cpp); what is not plain comes back here, to be converted
or refused.
"""

import datetime
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mylayers import _programs, sequential, stock
from mylayers._extension import _C
from mylayers.sequential import Chain, FusedSequential

__all__ = ["Frozen", "freeze"]

_STOCKS = {cls: stock.Stock(cls()) for cls in (FusedSequential, nn.Sequential)}


# ---- what a network computes -------------------------------------------------------------------


def _refuse(path: str, module: nn.Module, reason: str) -> NoReturn:
    where = f"{path}, a {type(module).__name__}," if path else f"a {type(module).__name__}"
    raise TypeError(f"freeze: {where} cannot be frozen: {reason}")


def _objection(container: nn.Sequential) -> str:
    """Why it may compute otherwise than its children one after another; "" if it does not."""
    cls = type(container)
    known = _STOCKS[FusedSequential if isinstance(container, FusedSequential) else nn.Sequential]
    difference = known.difference(cls)
    if difference.name:
        return f"{cls.__name__} overrides {known.cls.__name__}.{difference.name}"
    own = vars(container)
    if shadow := known.is_shadowed_by(own):
        return f"its {shadow} was replaced"
    if any(not stock.is_empty(own.get(hooks)) for hooks in stock.HOOKS):
        return "it has hooks"
    is_plain = type(own.get("_modules")) in stock.DICTIONARIES
    return "" if is_plain else "its children are not in a dict"


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers in order, those of containers inside it, too, with their names."""
    if not isinstance(module, nn.Sequential):
        yield path, module
        return
    if reason := _objection(module):
        _refuse(path, module, reason)
    for name, child in module._modules.items():
        yield from _children(f"{path}.{name}" if path else name, child)


def _program(network: nn.Module) -> tuple[str, tuple[Tensor, ...]]:
    """The operator's program for a network in evaluation mode, and its parameters.

    Raises:
        TypeError: a layer is none that one program computes.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        _refuse("", network, "there are hooks on all modules")
    named = list(_children("", network))
    children = [child for _, child in named]
    chains: list[Chain] = []
    refused: list[tuple[str, nn.Module, str]] = []
    place = 0
    for part in sequential.plan(children, evaluates=True):
        if isinstance(part, Chain):
            chains.append(part)
            place = part.children.stop
        else:
            refused.append((*named[place], part.reason))
            place += 1
    if refused:  # a layer that stands alone does so because of another one, if there is one
        alone = sequential.ALONE.reason
        _refuse(*next((one for one in refused if one[2] != alone), refused[0]))
    if not any(chain.has_linear for chain in chains):
        _refuse("", network, "it has no linear layer")
    (chain,) = chains
    return chain.program, tuple(sequential.parameters_of(children))


# ---- frozen networks ---------------------------------------------------------------------------

_NO_MODULE = (
    "it holds values, not parameters, and computes what evaluation mode does; train, move or save "
    "the network that it was made from, then refresh()"
)


class Frozen(_C.FrozenBase):
    r"""A network's values as they were, packed for this machine: what :func:`freeze` returns.

    It is a function and no ``nn.Module``: it has no parameters, modes, hooks or ``state_dict``. Any
    number of threads may call it at a time, while another one calls :meth:`refresh`, too. It can be
    pickled and copied, and is packed again where it is loaded; a copy knows no network to refresh
    itself from. Autocast does not change what it computes; tracers (``torch.jit.trace``,
    ``torch.export``) and transforms (``torch.func``) are refused, for they would take its values
    for constants.

    Args:
        input: ``(..., in_units)`` or ``(in_units)``, of the network's dtype, on the CPU: a
            ``torch.Tensor``, a NumPy array, or any object with ``__dlpack__``. It is not copied,
            unless its rows do not lie evenly or their values not side by side.
        out: memory for the result, a contiguous ``torch.Tensor`` or NumPy array of its shape and
            dtype that shares none with ``input``; None for new memory.

    Returns:
        ``out`` if it is given, else a NumPy array for a NumPy array and a ``torch.Tensor`` for all
        else, without a graph. A row's result has the bits that ``network.eval()(input)`` has
        under ``torch.no_grad()``, for a network that is a :class:`mylayers.FusedSequential`, or
        was optimized, or is one of our layers.

    Raises:
        TypeError: ``input`` or ``out`` is none of these, or is of a class that decides itself what
            operators do.
        RuntimeError: the shape, dtype or device of ``input`` or ``out`` does not fit; ``out`` is
            read-only, not contiguous, or overlaps ``input``; a gradient through it is asked for.

    Source:
        csrc/python/frozen.cpp, csrc/cpu/frozen.cpp.
    """

    _network: "weakref.ref[nn.Module] | None"
    _made_from: str
    _made_at: str

    def __repr__(self) -> str:
        """What it computes, and what it was made from, for which kernels, and when."""
        program, values = _C.unpack_frozen(self)
        count = sum(value.numel() for value in values)
        info = _C.build_info()
        machine = f"{info['kernels']} kernels"
        if info["tuned_for"]:
            machine += f" ({info['tuned_for']})"
        return (
            f"Frozen({self._made_from}: {_words(program, values)}; {count:,} values of "
            f"{_dtype_name(values[0].dtype)} for {machine}, of {self._made_at})"
        )

    def refresh(self) -> None:
        """Take the values that the network has now, for the calls that begin from now on.

        Raises:
            RuntimeError: the network is gone (only a weak reference is kept), or this is a copy.
            TypeError: the network has become one that cannot be frozen.
            ValueError: it has other layers, sizes or another dtype than it had.
        """
        network = self._network() if self._network is not None else None
        if network is None:
            why = "a copy knows none" if self._network is None else "it is gone"
            raise RuntimeError(
                f"Frozen.refresh: the network must be the one that this was made from, and {why}; "
                "call mylayers.freeze anew"
            )
        program, parameters = _program(network)
        old_program, old = _C.unpack_frozen(self)
        now, was = _words(program, parameters), _words(old_program, old)
        if now != was or parameters[0].dtype != old[0].dtype:
            raise ValueError(
                f"Frozen.refresh: the network must still be {was} of {_dtype_name(old[0].dtype)}; "
                f"got {now} of {_dtype_name(parameters[0].dtype)}: call mylayers.freeze anew"
            )
        _C.pack_frozen(self, program, parameters)
        self._made_at = _now()

    def __reduce__(self) -> Any:
        """By the values and the program."""
        return of_program, (*_C.unpack_frozen(self), self._made_from, self._made_at)

    def __getattr__(self, name: str) -> NoReturn:
        """For whoever takes it for a module."""
        why = f": {_NO_MODULE}" if hasattr(nn.Module, name) and name[:2] != "__" else ""
        raise AttributeError(f"Frozen has no {name}{why}")


def freeze(network: nn.Module) -> Frozen:
    r"""An immutable copy of a network, for serving: its values, packed for this machine.

    It computes what the network does in evaluation mode, whichever mode it is in: dropout does
    nothing. Only values are copied, once; :meth:`Frozen.refresh` takes them anew.

    Args:
        network: a :class:`mylayers.FusedSequential` or ``nn.Sequential``, optimized or not, with
            such containers inside it or none, all of whose layers can be fused and at least one
            of which is linear; or one ``nn.Linear`` or :class:`mylayers.MyLinear`. Its parameters
            are float32, float64, float16 or bfloat16, all of one dtype, on the CPU.

    Returns:
        A function of one input, see :class:`Frozen`.

    Raises:
        TypeError: ``network`` is not an ``nn.Module``, or has a layer that one call cannot compute;
            the message names it and says why.
        RuntimeError: the parameters' dtype, device or sizes do not fit.

    Source:
        mylayers/frozen.py; which layers are fused is :class:`mylayers.FusedSequential`'s.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mylayers
        >>> policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        >>> frozen, observation = mylayers.freeze(policy), torch.rand(4)
        >>> torch.allclose(frozen(observation), policy(observation), atol=1e-6)
        True
        >>> frozen(observation.numpy()).dtype
        dtype('float32')
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"freeze: network must be an nn.Module; got {type(network).__name__}")
    program, parameters = _program(network)
    made = of_program(program, parameters, type(network).__name__, _now())
    made._network = weakref.ref(network)
    return made


def of_program(
    program: str, parameters: Sequence[Tensor], made_from: str = "", made_at: str = ""
) -> Frozen:
    """One that knows no network: a program of ``mylayers::sequential``, and what it reads."""
    made = Frozen.__new__(Frozen)
    _C.pack_frozen(made, program, parameters)
    made._network, made._made_from, made._made_at = None, made_from, made_at
    return made


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _words(program: str, parameters: Sequence[Tensor]) -> str:
    """``64 -> 64 relu -> 8``, and the names of steps that are not linear."""
    words: list[str] = []
    left = iter(parameters)
    for step in _programs.parse(program):
        own = [next(left) for _ in range(step.parameters)]
        if not step.is_linear:
            words.append(f"{step.name}{step.numbers}" if step.numbers else step.name)
            continue
        weight = own[0]
        units = weight.shape[step.units_dim]
        in_units = weight.shape[1 - step.units_dim]
        words.append(f"{in_units} -> {units}" + (f" {step.activation}" if step.activation else ""))
    return ", ".join(words)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# ---- calls that are not plain ------------------------------------------------------------------


def _call_slowly(frozen: Frozen, input: Any, out: Any) -> Any:
    """The call's result where arguments or modes are not plain, or what is wrong with them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "Frozen: a tracer must follow the network itself; it would take these values for "
            "constants"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("Frozen: transforms of torch.func must be given the network itself")
    dtype = _C.unpack_frozen(frozen)[1][0].dtype
    sizes = _C.frozen_sizes(frozen)
    x = _plain("input", input, dtype)
    if x.ndim == 0 or (sizes is not None and x.shape[-1] != sizes[0]):
        expected = "..., in_units" if sizes is None else f"..., {sizes[0]}"
        raise RuntimeError(f"Frozen: input must be ({expected}); got {tuple(x.shape)}")
    if out is not None:
        shape = None if sizes is None else (*x.shape[:-1], sizes[1])
        y = _checked_out(_plain("out", out, dtype), x, shape)
        _C.call_frozen(frozen, _side_by_side(x), y)
        return out
    return _C.call_frozen(frozen, _side_by_side(x), None)


def _plain(name: str, value: Any, dtype: torch.dtype) -> Any:
    """A ``torch.Tensor`` or NumPy array of no class of its own, over the same memory."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        if sequential.is_foreign(value):
            cls = type(value).__name__
            raise TypeError(f"Frozen: {name} must be a plain torch.Tensor; got {cls}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise RuntimeError(
                f"Frozen: {name} must be a dense tensor on cpu; got {value.layout} on "
                f"{value.device}"
            )
        tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
        if (value.requires_grad and torch.is_grad_enabled()) or isinstance(tangent, Tensor):
            raise RuntimeError(
                f"Frozen: {name} must not require a gradient, which only the network itself has; "
                "got one that does (call it under torch.no_grad(), or with a detached tensor)"
            )
        found = value.dtype
        value = value if type(value) in stock.TENSORS else value.as_subclass(Tensor)
        if value.is_neg():
            if name == "out":
                raise RuntimeError("Frozen: out must have its values in memory; got a negated view")
            value = value.resolve_neg()
    elif numpy is not None and isinstance(value, numpy.ndarray):
        if isinstance(value, numpy.ma.MaskedArray):
            raise TypeError(f"Frozen: {name} must have no mask; got {type(value).__name__}")
        value = value.view(numpy.ndarray)
        found = value.dtype
        if found.isnative and found.name == _dtype_name(dtype):
            found = dtype
    elif name == "input" and hasattr(value, "__dlpack__"):
        return _plain(name, torch.utils.dlpack.from_dlpack(value), dtype)
    else:
        others = ", or have __dlpack__" if name == "input" else ""
        raise TypeError(
            f"Frozen: {name} must be a torch.Tensor or NumPy array{others}; "
            f"got {type(value).__name__}"
        )
    if found != dtype:
        raise RuntimeError(
            f"Frozen: {name} must be {_dtype_name(dtype)}, as the values are; "
            f"got {_dtype_name(found)}"
        )
    return value


def _side_by_side(x: Any) -> Any:
    """Itself, or a copy that is contiguous."""
    if isinstance(x, Tensor):
        return x.contiguous()
    return sys.modules["numpy"].require(x, requirements=["C", "ALIGNED"])


def _checked_out(out: Any, x: Any, shape: tuple[int, ...] | None) -> Any:
    if shape is not None and tuple(out.shape) != shape:
        raise RuntimeError(
            f"Frozen: out must be {shape} for input {tuple(x.shape)}; got {tuple(out.shape)}"
        )
    if isinstance(out, Tensor):
        contiguous, writable = out.is_contiguous(), True
    else:
        contiguous = out.flags.c_contiguous and out.flags.aligned
        writable = out.flags.writeable
    if not writable:
        raise RuntimeError("Frozen: out must be writable; got a read-only array")
    if not contiguous:
        raise RuntimeError(f"Frozen: out must be contiguous; got strides {_strides(out)} in bytes")
    (x_begin, x_end), (begin, end) = _bounds(x), _bounds(out)
    if x_begin < end and begin < x_end:
        raise RuntimeError("Frozen: out must share no memory with input; got one that overlaps it")
    return out


def _strides(x: Any) -> tuple[int, ...]:
    if isinstance(x, Tensor):
        return tuple(stride * x.element_size() for stride in x.stride())
    return tuple(x.strides)


def _bounds(x: Any) -> tuple[int, int]:
    """The addresses between which its elements lie; nothing between them if it has none."""
    if 0 in x.shape:
        return 0, 0
    tensor = isinstance(x, Tensor)
    first = x.data_ptr() if tensor else x.__array_interface__["data"][0]
    spans = [(n - 1) * stride for n, stride in zip(x.shape, _strides(x), strict=True)]
    low, high = sum(s for s in spans if s < 0), sum(s for s in spans if s > 0)
    return first + low, first + high + (x.element_size() if tensor else x.itemsize)


_C.keep_frozen(Frozen, _call_slowly)
