"""Programs of ``mylayers::sequential``, read by who translates or counts them.

csrc/steps/program.h has their grammar, and is who refuses what is none.
"""

from typing import NamedTuple

from mylayers.activations import row_of

__all__ = ["Step", "parse"]

_LINEAR = ("linear", "linear_t")


class Step(NamedTuple):
    """A step of a program.

    Attributes:
        name: "linear", "linear_t", "center", "layer_norm", "flatten", "add" or an activation's,
            with its setting.
        numbers: the dimensions of a center or flatten; the sizes of a layer_norm.
        epsilon: of a layer_norm.
        has_weight, has_bias: which parameters it has.
        activation: that of a linear step.
        inputs: the values that it reads; 0 is the program's input, i what its i-th step makes.
    """

    name: str
    numbers: tuple[int, ...]
    epsilon: float
    has_weight: bool
    has_bias: bool
    activation: str | None
    inputs: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        return self.name in _LINEAR

    @property
    def units_dim(self) -> int:
        """The dimension of a linear step's weight that is its units."""
        return 0 if self.name == "linear_t" else 1

    @property
    def parameters(self) -> int:
        return self.has_weight + self.has_bias


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def parse(program: str) -> list[Step]:
    """The steps of a program that the operator takes."""
    steps = []
    for place, text in enumerate(program.split("; ")):
        step, _, inputs = text.partition("@")
        head, *suffixes = step.split("+")
        is_activation = row_of(head) is not None
        name, _, numbers = (head, "", "") if is_activation else head.rstrip(")").partition("(")
        epsilon = 0.0
        if name == "layer_norm":
            numbers, _, last = numbers.rpartition(",")
            epsilon = float(last)
        is_linear, has_bias = name in _LINEAR, "bias" in suffixes
        activation = suffixes[-1] if is_linear and len(suffixes) > has_bias else None
        named = _numbers(inputs) or (place,)
        has_weight = is_linear or "weight" in suffixes
        made = Step(name, _numbers(numbers), epsilon, has_weight, has_bias, activation, named)
        steps.append(made)
    return steps
