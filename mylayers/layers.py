"""The layers as modules: parameters, initialisation, repr and state; functional computes."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedParameter

from mylayers import functional, stock
from mylayers._extension import _C
from mylayers.activations import NAMES, row_of
from mylayers.convert import linear_from, linear_to

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mylayers.sync import Group

__all__ = ["CenteredLayer", "LazyMyLinear", "MyLinear"]

# Asks less than is_compiling and takes half as long; export has a mode of its own.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]
_REFUSED = _C.REFUSED


def _integer(value: object) -> int | None:
    """The value of whatever acts as an integer, NumPy's included; None for all else."""
    # Truth values of NumPy and torch pass for 0 and 1, with a warning at most.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def _size(name: str, value: object) -> int:
    size = _integer(value)
    if size is None:
        raise TypeError(f"MyLinear: {name} must be an int; got {value!r}")
    if size < 0:
        raise ValueError(f"MyLinear: {name} must not be negative; got {size}")
    return size


class MyLinear(nn.Module):
    r"""A dense layer with its activation: ``relu(X @ weight + bias)`` in one operator.

    Args:
        in_units: size of each input row.
        units: size of each output row.
        bias: whether to add a learnt bias.
        activation: ``"relu"``, ``"gelu"``, ``"elu(0.5)"`` or another name that
            :func:`mylayers.functional.linear_act` takes, or None.
        device: where the parameters are made.
        dtype: floating dtype of the parameters.

    Shape:
        input ``(..., in_units)``, output ``(..., units)``.

    Attributes:
        weight: ``(in_units, units)``: the transpose of ``nn.Linear``'s. ``nn.init.xavier_*``
            treats both alike; ``nn.init.kaiming_*`` reads the fan-in from dimension 1, so pass
            it ``weight.T``.
        bias: ``(units)``, or None.

    Raises:
        TypeError: a size is not an integer, or ``activation`` neither a string nor None.
        ValueError: a size is negative, or ``activation`` is an unknown name.

    Source:
        :func:`mylayers.functional.linear_act`.

    Example:
        >>> import torch
        >>> from mylayers import MyLinear
        >>> layer = MyLinear(5, 3)
        >>> layer(torch.rand(2, 5)).shape
        torch.Size([2, 3])
        >>> layer
        MyLinear(in_units=5, units=3, bias=True, activation='relu')
    """

    __constants__ = ["activation", "in_units", "units"]  # noqa: RUF012  (torch.nn's protocol)

    in_units: int
    units: int
    activation: str | None
    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in_units: int,
        units: int,
        bias: bool = True,
        activation: str | None = "relu",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_units = _size("in_units", in_units)
        self.units = _size("units", units)
        if activation is not None and not isinstance(activation, str):
            raise TypeError(
                f"MyLinear: activation must be a str or None; got {type(activation).__name__}"
            )
        if activation is not None and row_of(activation) is None:
            raise ValueError(
                f"MyLinear: activation must be one of {NAMES} or None; got {activation!r}"
            )
        self.activation = activation
        self._make_parameters(bias, device, dtype)
        self.reset_parameters()

    def _make_parameters(
        self, bias: bool, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        self.weight = Parameter(torch.empty(self.in_units, self.units, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(self.units, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw the parameters anew from the standard normal distribution, weight first.

        For one seed these are the very values of ``torch.randn(in_units, units)`` followed by
        ``torch.randn(units)``.
        """
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.normal_(self.bias)

    def __call__(self, input: Any = _REFUSED, /, *args: Any, **kwargs: Any) -> Any:
        """As any module's; the extension goes straight to the operator where that is the same.

        The way of ``nn.Module`` to ``forward`` is a third of the time of a small layer.
        """
        if input is _REFUSED or args or kwargs or _is_compiling():
            given = args if input is _REFUSED else (input, *args)
            return super().__call__(*given, **kwargs)
        output = _C.call_layer(self, input)
        return super().__call__(input) if output is _REFUSED else output

    def forward(self, input: Tensor) -> Tensor:
        """``act(input @ weight + bias)``; see :func:`mylayers.functional.linear_act`."""
        if _is_scripting():
            return torch.ops.mylayers.linear_act(input, self.weight, self.bias, self.activation)  # type: ignore[no-any-return]
        # nn.Module finds a parameter only after every other place has failed: half a microsecond
        # each, a third of a small call. The extension takes it from its place where there is no
        # other: no property, no attribute, no __getattr__.
        if not _is_compiling():
            output = _C.run_layer(self, input)
            if output is None:
                _keep(self)
            elif output is not _REFUSED:
                return output  # type: ignore[no-any-return]
        return functional.linear_act(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """Sizes, bias and activation, as the constructor takes them."""
        return (
            f"in_units={self.in_units}, units={self.units}, bias={self.bias is not None}, "
            f"activation={self.activation!r}"
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = "relu") -> "MyLinear":
        """A layer with the values of a stock one: ``act(linear(X))``.

        Args:
            linear: its parameters are copied, the weight transposed; dtype, device,
                ``requires_grad`` and training mode are kept.
            activation: ``"relu"``, ``"gelu"``, ``"elu(0.5)"`` or another name that
            :func:`mylayers.functional.linear_act` takes, or None.

        Returns:
            A new layer that shares nothing with ``linear``.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``.

        Example:
            >>> import torch
            >>> from mylayers import MyLinear
            >>> linear = torch.nn.Linear(2, 1)
            >>> x = torch.arange(12.0).reshape(6, 2)
            >>> torch.allclose(MyLinear.from_linear(linear)(x), torch.relu(linear(x)), atol=1e-5)
            True
        """
        return linear_from(cls, linear, activation)

    def to_linear(self) -> nn.Linear:
        """The affine part as a stock ``nn.Linear``, copied; the activation is left to the caller.

        Returns:
            A new layer that shares nothing with this one; dtype, device, ``requires_grad`` and
            training mode are kept.

        Example:
            >>> import torch
            >>> from mylayers import MyLinear
            >>> layer, x = MyLinear(4, 3), torch.rand(2, 4)
            >>> torch.allclose(torch.relu(layer.to_linear()(x)), layer(x), atol=1e-5)
            True
        """
        return linear_to(self)


STOCK_MY_LINEAR = stock.stock_linear(MyLinear)


def _keep(layer: MyLinear) -> None:
    """Let the extension know whether the layer's parameters are found where it looks."""
    cls = type(layer)
    version, difference = stock.judge(cls, STOCK_MY_LINEAR)
    kind: stock.Kind = cls, version if difference.is_stocks else 0, None
    if not version or difference.name:
        _C.keep_layer(layer, kind, False, None)
        return
    own = stock.own_state(layer)
    entries = stock.entries(own, ("activation",), "_parameters", hooks=False)
    activation = own.get("activation")
    is_stock = (
        entries is not None
        and not STOCK_MY_LINEAR.is_shadowed_by(own)
        and type(own.get("_parameters")) is dict
        and own["_parameters"].keys() >= {"weight", "bias"}
        and (activation is None or (type(activation) is str and row_of(activation) is not None))
    )
    _C.keep_layer(layer, (cls, version, entries), is_stock, activation if is_stock else None)


class LazyMyLinear(LazyModuleMixin, MyLinear):
    r"""A :class:`MyLinear` that takes ``in_units`` from its first input, then becomes one.

    Args:
        units: size of each output row.
        bias: whether to add a learnt bias.
        activation: ``"relu"``, ``"gelu"``, ``"elu(0.5)"`` or another name that
            :func:`mylayers.functional.linear_act` takes, or None.
        device: where the parameters are made.
        dtype: floating dtype of the parameters.

    Shape:
        input ``(..., in_units)``, output ``(..., units)``.

    Raises:
        TypeError, ValueError: as :class:`MyLinear`.

    Source:
        :func:`mylayers.functional.linear_act`.

    Example:
        >>> import torch
        >>> from mylayers import LazyMyLinear
        >>> layer = LazyMyLinear(3)
        >>> layer(torch.rand(2, 5)).shape
        torch.Size([2, 3])
        >>> layer
        MyLinear(in_units=5, units=3, bias=True, activation='relu')
    """

    cls_to_become = MyLinear

    def __init__(
        self,
        units: int,
        bias: bool = True,
        activation: str | None = "relu",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(0, units, bias, activation, device=device, dtype=dtype)

    def _make_parameters(
        self, bias: bool, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        self.weight = UninitializedParameter(device=device, dtype=dtype)  # type: ignore
        if bias:
            self.bias = UninitializedParameter(device=device, dtype=dtype)  # type: ignore
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw the parameters, once their sizes are known."""
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor) -> None:
        """Take ``in_units`` from ``input``, then make and draw the parameters."""
        if not isinstance(input, Tensor):
            raise TypeError(
                f"LazyMyLinear: input must be a torch.Tensor; got {type(input).__name__}"
            )
        if self.has_uninitialized_params():
            with torch.no_grad():
                self.weight.materialize((input.shape[-1], self.units))  # type: ignore[attr-defined]
                if self.bias is not None:
                    self.bias.materialize((self.units,))  # type: ignore[attr-defined]
                self.in_units = input.shape[-1]
                self.reset_parameters()
        else:  # loaded from a state_dict before the first input
            self.in_units = self.weight.shape[0]


class CenteredLayer(nn.Module):
    r"""Subtract the mean: ``X - X.mean()``, in one operator.

    Args:
        dim: the dimension or dimensions to average over; all of them if None.
        process_group: the processes that share a batch, split along dimension 0. The result is
            then this process's rows of what one process computes for the whole batch, in training
            and evaluation alike. ``torch.distributed.group.WORLD`` is all processes (and None
            before ``init_process_group``); None is this process alone. Shards may be uneven or
            empty, but every process of the group must take part in every call and in its
            gradient: one all-reduce each, of sum and count, in float64. A mean that leaves out
            dimension 0 needs none.

    Shape:
        input of any shape, output of the same.

    Raises:
        TypeError: ``dim`` is not None, an integer or a sequence of integers, or
            ``process_group`` not a process group.
        ValueError: this process is not in ``process_group``.

    Source:
        :func:`mylayers.functional.center`; over processes, mylayers/sync.py.

    Example:
        >>> import torch
        >>> from mylayers import CenteredLayer
        >>> CenteredLayer()(torch.FloatTensor([1, 2, 3, 4, 5]))
        tensor([-2., -1.,  0.,  1.,  2.])
    """

    # torch.nn's protocols.
    __constants__ = ["dim"]  # noqa: RUF012
    __jit_ignored_attributes__ = ["_group"]  # noqa: RUF012
    __jit_unused_properties__ = ["process_group"]  # noqa: RUF012

    dim: int | tuple[int, ...] | None
    _group: "Group | None" = None

    def __init__(
        self,
        dim: int | Sequence[int] | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        self.dim = self._checked(dim)
        self.process_group = process_group

    @staticmethod
    def _checked(dim: object) -> int | tuple[int, ...] | None:
        if dim is None:
            return None
        single = _integer(dim)
        if single is not None:
            return single
        listed = isinstance(dim, Sequence) and not isinstance(dim, str | bytes)
        dims = [_integer(d) for d in dim] if listed else [None]  # type: ignore[attr-defined]
        if None in dims:
            raise TypeError(
                f"CenteredLayer: dim must be None, an int or a sequence of ints; got {dim!r}"
            )
        return tuple(d for d in dims if d is not None)

    @property
    def process_group(self) -> "ProcessGroup | None":
        """The processes that share a batch; may be set anew.

        Raises:
            RuntimeError: the group does not exist here, as may be after unpickling.
        """
        return self._group and self._group.resolve()

    @process_group.setter
    def process_group(self, process_group: "ProcessGroup | None") -> None:
        if process_group is None:
            self._group = None
        else:
            from mylayers import sync  # only now: PyTorch's collectives take long to import

            self._group = sync.Group.of(process_group)

    def forward(self, input: Tensor) -> Tensor:
        """``input - input.mean(dim)``; see :func:`mylayers.functional.center`."""
        if _is_scripting():
            return torch.ops.mylayers.center(input, self.dim)  # type: ignore[no-any-return]
        if self._group is None:
            return functional.center(input, self.dim)
        return self._center_over(self._group, input)

    def _center_over(self, group: "Group", input: Tensor) -> Tensor:
        from mylayers import sync

        return sync.center(input, self.dim, group)

    def __prepare_scriptable__(self) -> "CenteredLayer":
        """Itself, which ``torch.jit.script`` asks for, unless it would lose the group.

        Raises:
            RuntimeError: the mean is over several processes.
        """
        if self._group is not None:
            raise RuntimeError(
                "CenteredLayer: torch.jit.script cannot take a mean over a process group; use "
                "torch.export.export, or set process_group = None for the mean in one process"
            )
        return self

    def extra_repr(self) -> str:
        """The dimensions, unless all, and the processes, unless one."""
        parts = [] if self.dim is None else [f"dim={self.dim}"]
        if self._group is not None:
            parts.append(f"ranks={list(self._group.ranks)}")
        return ", ".join(parts)
