"""Forwards that users wrote: consecutive layers in them, computed by one call of one operator.

No forward is traced or replaced as a whole. Its source is read (:mod:`mylayers._source`), and where
it calls layers one after another, in an expression or in whole lines, those are a *region*. The
forward of the class that :func:`mylayers.optimize` gives is the user's own, in which each region
stands twice::

    if run(self, 0, x, box):  # as planned: computed in C++
        x = box.pop()
    else:
        x = F.relu(self.hidden(x))  # the user's own line

``run`` (csrc/python/forwards.cpp) first compares all that the line would read with what it was when
the region was planned (:mod:`mylayers._following`). It runs no code of the user's, and where
something differs nothing has been done when the line itself runs.
"""

import ast
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mylayers import _source, sequential
from mylayers._extension import _C
from mylayers._following import Element, Follower, FollowError, Node
from mylayers._source import Source
from mylayers.sequential import Chain, FusedSequential
from mylayers.stock import DICTIONARIES, Kind, Stock, judge

__all__ = ["OptimizedForward", "Region", "Rewriting", "has_own_forward", "prepare",
           "refusal"]  # fmt: skip

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # takes half as long
_REFUSED = _C.REFUSED


class OptimizedForward(nn.Module):
    """What the classes have in common whose forward is a user's with regions."""

    def __call__(self, input: Any = _REFUSED, /, *args: Any, **kwargs: Any) -> Any:
        """As any module's; the extension goes straight to the forward where that is all."""
        if input is _REFUSED or args or kwargs or _is_dynamo_compiling():
            given = args if input is _REFUSED else (input, *args)
            return super().__call__(*given, **kwargs)
        output = _C.call_forward(self, input)
        if output is not _REFUSED:
            return output
        # Another thread's restore may have taken the class away since this began.
        cls = type(self)
        if not issubclass(cls, OptimizedForward):
            return cls.__call__(self, input)
        return super(OptimizedForward, cls).__call__(self, input)


class _OfSequential(OptimizedForward, FusedSequential):
    pass


# As a call goes to its forward; as its forward reads its attributes, where the class has one.
_STOCKS = {cls: Stock(made(), {"forward"}) for cls, made in (
    (nn.Sequential, _OfSequential), (nn.Module, OptimizedForward))}  # fmt: skip
_ORIGINALS = {cls: Stock(cls(), {"forward"}) for cls in (nn.Sequential, nn.Module)}


def _base(cls: type) -> type[nn.Module]:
    return nn.Sequential if issubclass(cls, nn.Sequential) else nn.Module


def _forward_of(cls: type) -> object:
    """What its forward is, as it lies in a class."""
    return next((vars(b)["forward"] for b in cls.__mro__ if "forward" in vars(b)), None)


def has_own_forward(cls: type) -> bool:
    """Whether its forward is neither nn.Module's nor a container's of PyTorch or ours."""
    return not any(_forward_of(cls) is vars(stock)["forward"] for stock in _WITHOUT)


_WITHOUT = (nn.Module, nn.Sequential, FusedSequential)


# ---- a region ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a region stands in a forward.

    Attributes:
        block: the address of the list of lines that it is in, or of the expression that it is.
        start: its first line there.
        stop: behind its last one; 0 for an expression.
        input: the name that it takes the tensor from.
        output: the name that it gives its result; "" where it returns it, or is an expression.
    """

    block: int
    start: int
    stop: int
    input: str
    output: str

    def crosses(self, other: "_Place") -> bool:
        """Whether both cannot stand in one forward."""
        if self.block != other.block:
            return False
        same = (self.start, self.stop) == (other.start, other.stop)
        apart = self.stop <= other.start or other.stop <= self.start
        inside = self.start <= other.start and other.stop <= self.stop
        around = other.start <= self.start and self.stop <= other.stop
        return same if self.stop == 0 or same else not (apart or inside or around)


@dataclass(frozen=True)
class Region:
    """Layers that a forward calls one after another, for a module as it is.

    Attributes:
        place: where.
        program: the operator's, see csrc/sequential.h.
        elements: the layers.
        nodes: the modules that it reads.
        globals: what its names are in the function's globals.
        builtins: and among the builtins.
    """

    place: _Place
    program: str
    elements: tuple[Element, ...]
    nodes: tuple[Node, ...]
    globals: dict[str, Any]
    builtins: dict[str, Any]

    @property
    def label(self) -> str:
        """Its layers, as the forward names them."""
        return " + ".join(element.label for element in self.elements)

    @property
    def modules(self) -> list[nn.Module]:
        """Its layers that are modules."""
        return [self.nodes[e.node].module for e in self.elements if e.node >= 0]


# ---- finding them ------------------------------------------------------------------------------

_DYNAMIC = ("locals", "vars", "eval", "exec", "dir")  # of which any may see names
_FRAMES = ("_getframe", "currentframe")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp,
           ast.SetComp, ast.DictComp, ast.GeneratorExp)  # fmt: skip


def _objection(source: Source) -> str:
    """Why no line of a forward may be replaced; "" if there is no such reason."""
    code = source.code
    if code.co_argcount == 0:
        return "it has no self"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global | ast.Nonlocal):
            return "it assigns to variables of others"
        if isinstance(node, ast.Name):
            if node.id in _DYNAMIC:
                return f"it calls {node.id}"
            if node.id == code.co_varnames[0] and not isinstance(node.ctx, ast.Load):
                return f"it assigns to {node.id}"
        if isinstance(node, ast.Attribute) and node.attr in _FRAMES:
            return "it looks at frames"
    return ""


class _Names:
    """Where a forward reads names."""

    def __init__(self, source: Source) -> None:
        self._parents: dict[int, ast.AST] = {}
        self._reads: list[ast.Name] = []
        self._shared = {*source.code.co_cellvars, *source.code.co_freevars}
        for node in ast.walk(source.tree):
            for child in ast.iter_child_nodes(node):
                self._parents[id(child)] = node
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and (
                not isinstance(node.ctx, ast.Store)
                or isinstance(self._parents[id(node)], ast.AugAssign)
            ):
                self._reads.append(node)

    def _around(self, line: ast.AST) -> Iterator[ast.AST]:
        while (above := self._parents.get(id(line))) is not None:
            yield above
            line = above

    def output_of(self, lines: list[ast.stmt], returns: bool, results: set[str]) -> str | None:
        """The one name by which the rest reads what lines assign; "" where they return it.

        None if they cannot be replaced.

        Args:
            lines: the lines.
            returns: whether they end in a return.
            results: names that stand for their result.
        """
        inside = [node for line in lines for node in ast.walk(line)]
        ids = set(map(id, inside))
        assigned = {
            n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        around = list(self._around(lines[0]))
        again = any(isinstance(a, ast.For | ast.While | ast.AsyncFor) for a in around)
        caught = any(isinstance(a, _TRIES) for a in around)
        end = (lines[-1].end_lineno or 0, lines[-1].end_col_offset or 0)

        def is_read(name: str) -> bool:
            for read in self._reads:
                if read.id != name or id(read) in ids:
                    continue
                later = (read.lineno, read.col_offset) >= end
                if caught or (not returns and (again or later)):
                    return True
            return False

        if assigned & self._shared:
            return None
        read = {name for name in assigned if is_read(name)}
        if returns:
            return None if read else ""
        if not read:
            return min(results & assigned, default=None)
        return read.pop() if len(read) == 1 and read <= results else None


_TRIES = tuple(getattr(ast, name) for name in ("Try", "TryStar") if hasattr(ast, name))


def _chain(follower: Follower) -> str:
    """The program of the layers that were followed; "" if they are not worth one or have none."""
    layers: list[Any] = [element.layer for element in follower.elements]
    if len({element.call for element in follower.elements}) < 2:
        return ""
    # Elsewhere it may change what backward needs, which stock refuses.
    for before, layer in zip([None, *layers], layers, strict=False):
        if layer.in_place and not (before and before.is_affine):
            return ""
    parts = sequential.parts_of(layers)
    if len(parts) != 1 or not isinstance(parts[0], Chain) or len(parts[0].children) < len(layers):
        return ""
    return parts[0].program if parts[0].has_linear else ""


class _Search:
    """For the regions of a module's forward."""

    def __init__(self, module: nn.Module, source: Source, names: _Names, evaluates: bool) -> None:
        self._module, self._source, self._names = module, source, names
        self._evaluates = evaluates
        self.found: list[Region] = []
        # Why what calls a module is not followed further, by its id.
        self.reasons: dict[int, str] = {}

    def _follower(self) -> Follower:
        return Follower(self._module, self._source, self._evaluates)

    def _region(self, follower: Follower, place: _Place, program: str) -> Region:
        nodes = tuple(
            replace(node, children=dict(node.children), attributes=dict(node.attributes))
            for node in follower.nodes
        )
        return Region(
            place,
            program,
            tuple(follower.elements),
            nodes,
            dict(follower.globals),
            dict(follower.builtins),
        )

    def _note(self, follower: Follower, reason: FollowError) -> None:
        for node in follower.nodes[1:]:
            self.reasons.setdefault(id(node.module), str(reason))

    def in_block(self, block: list[ast.stmt]) -> None:
        """Lines, as many together as there can be."""
        start = 0
        while start < len(block):
            longest = self._longest(block, start)
            if longest is None:
                self._below(block[start])
                start += 1
            else:
                self.found.append(longest)
                start = longest.place.stop

    def _longest(self, block: list[ast.stmt], start: int) -> Region | None:
        longest, follower = None, self._follower()
        for stop in range(start + 1, len(block) + 1):
            try:
                follower.follow(block[stop - 1])
            except FollowError as e:
                self._note(follower, e)
                break
            program = _chain(follower) if follower.input else ""
            if program:
                results = {n for n, v in follower.names.items() if v == follower.flow}
                lines = block[start:stop]
                output = self._names.output_of(lines, follower.returned, results)
                if output is not None:
                    place = _Place(id(block), start, stop, follower.input, output)
                    longest = self._region(follower, place, program)
            if follower.returned:
                break
        return longest

    def _below(self, node: ast.AST) -> None:
        """What a line, or an expression, is made of."""
        if isinstance(node, _SCOPES):
            return
        if isinstance(node, ast.Call) and self._is_region(node):
            return
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.in_block(value)
            elif isinstance(value, list):
                for one in value:
                    if isinstance(one, ast.AST):
                        self._below(one)
            elif isinstance(value, ast.AST):
                self._below(value)

    def _is_region(self, call: ast.Call) -> bool:
        follower = self._follower()
        try:
            result = follower.value(call)
        except FollowError as e:
            self._note(follower, e)
            return False
        program = _chain(follower)
        if not program or result != follower.flow:
            return False
        place = _Place(id(call), 0, 0, follower.input, "")
        self.found.append(self._region(follower, place, program))
        return True


# ---- a class -----------------------------------------------------------------------------------


def refusal(cls: type[nn.Module]) -> str:
    """Why the forward of a class cannot be looked into; "" if it can."""
    base = _base(cls)
    _, difference = judge(cls, _ORIGINALS[base])
    if difference.name.startswith("metaclass "):
        return f"{cls.__name__} has the {difference.name}"
    if difference.name:
        return f"{cls.__name__} overrides {base.__name__}.{difference.name}"
    return ""


class Rewriting:
    """The forward of a class, and the places in it where regions are.

    Attributes:
        original: the class.
        source: its forward's.
    """

    def __init__(self, original: type[nn.Module], source: Source) -> None:
        self.original, self.source = original, source
        self._names = _Names(source)
        self._places: list[_Place] = []
        self._making = threading.Lock()

    @staticmethod
    def of(original: type[nn.Module]) -> "Rewriting | str":
        """That of a class, or why there can be none."""
        name = f"{original.__name__}.forward"
        source = _source.read(_forward_of(original))
        if isinstance(source, str):
            return f"{name} cannot be followed: {source}"
        objection = _objection(source)
        return (
            f"{name} cannot be followed: {objection}" if objection else Rewriting(original, source)
        )

    def is_current(self) -> bool:
        """Whether the class still has this forward."""
        function = self.source.function
        return _forward_of(self.original) is function and function.__code__ is self.source.code

    def calls_super(self) -> bool:
        """Whether it calls ``super().forward``."""
        return any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "forward"
            and isinstance(node.func.value, ast.Call)
            and isinstance(node.func.value.func, ast.Name)
            and node.func.value.func.id == "super"
            for node in ast.walk(self.source.tree)
        )

    def search(self, module: nn.Module, evaluates: bool) -> "_Search":
        """For the regions of a module of the class."""
        search = _Search(module, self.source, self._names, evaluates)
        if not self.has_any_arguments():
            search.in_block(self.source.tree.body)
        return search

    def has_any_arguments(self) -> bool:
        """Whether it takes any number of arguments, or some by name alone.

        torch.fx takes the code of such a forward apart, and must find the user's own.
        """
        given = self.source.tree.args
        return bool(given.vararg or given.kwonlyargs or given.kwarg)

    def number(self, cls: type[nn.Module], places: Iterable[_Place]) -> dict[_Place, int]:
        """Those places that the forward of a class of ours has, new ones among them, by number."""
        with self._making:
            before = len(self._places)
            for place in places:
                if not any(place == one or place.crosses(one) for one in self._places):
                    self._places.append(place)
            if len(self._places) > before:
                cls.forward = self._forward(cls)
            return {place: i for i, place in enumerate(self._places)}

    def is_whole(self, place: _Place) -> bool:
        """Whether a region is all that the forward does with its one argument."""
        given, body = self.source.tree.args, self.source.tree.body
        names = [a.arg for a in (*given.posonlyargs, *given.args)]
        first = int(isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant))
        returns = place.stop > 0 and not place.output
        if not (len(names) == 2 and place.input == names[1] and returns):
            return False
        return place.block == id(body) and place.start <= first

    def _forward(self, cls: type[nn.Module]) -> Callable[..., Any]:
        """The user's own forward, or that with regions: chosen before arguments get defaults."""
        function = self.source.function
        written = _Writer(self.source, self._places).definition()
        with_regions = _source.made(self.source, written, {_RUN: _C.run_region})
        code = function.__code__
        read = cls, self.original, function, code, function.__defaults__, function.__kwdefaults__
        return _source.in_place_of(
            function,
            _chosen,
            compiles=_is_compiling,
            leaves=_C.leaves_forward,
            read=read,
            above=functools.partial(_above, cls, self.original),
            with_regions=with_regions,
        )


def _above(cls: Any, original: Any, module: Any) -> Any:
    """The forward that a module of a class of ours would have without it."""
    if isinstance(module, cls):
        return super(cls, module).forward
    return functools.partial(original.forward, module)  # it has been restored meanwhile


def _chosen(compiles: Any, leaves: Any, read: Any, above: Any, with_regions: Any) -> Any:
    def forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if compiles() or leaves(read, self):
            return above(self)(*args, **kwargs)
        return with_regions(self, *args, **kwargs)

    return forward


# ---- writing it --------------------------------------------------------------------------------

# Names that a forward of ours has besides the user's.
_RUN, _BOX = "__mylayers_run", "__mylayers_box"


def _parsed(text: str) -> Any:
    return ast.parse(text).body[0]


class _Writer:
    """Writes a forward with regions."""

    def __init__(self, source: Source, places: list[_Place]) -> None:
        self._tree = source.tree
        self._self = source.code.co_varnames[0]
        self._places = places

    def definition(self) -> ast.FunctionDef:
        """The whole function."""
        body = self._block(self._tree.body)
        first = int(
            isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        )
        body.insert(first, self._at(_parsed(f"{_BOX} = []"), self._tree))
        made = ast.FunctionDef(
            name=self._tree.name, args=self._tree.args, body=body, decorator_list=[], returns=None
        )
        return ast.copy_location(made, self._tree)

    @staticmethod
    def _at(made: Any, where: ast.AST) -> Any:
        """What was made, with the line numbers of what it stands for."""
        for node in ast.walk(made):
            if "lineno" in node._attributes:
                ast.copy_location(node, where)
        return made

    def _test(self, place: _Place, where: ast.AST) -> ast.expr:
        number = self._places.index(place)
        text = f"{_RUN}({self._self}, {number}, {place.input}, {_BOX})"
        return self._at(_parsed(text).value, where)  # type: ignore[no-any-return]

    def _taken(self, text: str, where: ast.AST) -> Any:
        return self._at(_parsed(text), where)

    def _block(self, block: list[ast.stmt], within: _Place | None = None) -> list[ast.stmt]:
        """Lines, of which the regions stand twice; those within a region, where it is left."""
        start, stop = (within.start, within.stop) if within else (0, len(block))
        here = [
            p
            for p in self._places
            if p.block == id(block) and p.stop and start <= p.start and p.stop <= stop
        ]
        here = [p for p in here if within is None or p.stop - p.start < stop - start]
        lines: list[ast.stmt] = []
        while start < stop:
            starting = [p for p in here if p.start == start]
            if not starting:
                lines.append(self._copy(block[start]))
                start += 1
                continue
            place = max(starting, key=lambda p: p.stop)
            line = block[start]
            text = f"{place.output} = {_BOX}.pop()" if place.output else f"return {_BOX}.pop()"
            made = ast.If(
                test=self._test(place, line),
                body=[self._taken(text, line)],
                orelse=self._block(block, place),
            )
            lines.append(ast.copy_location(made, line))
            start = place.stop
        return lines

    def _copy(self, node: Any) -> Any:
        if isinstance(node, list):
            if node and isinstance(node[0], ast.stmt):
                return self._block(node)
            return [self._copy(one) for one in node]
        if not isinstance(node, ast.AST):
            return node
        fields = {name: self._copy(value) for name, value in ast.iter_fields(node)}
        copy: Any = ast.copy_location(type(node)(**fields), node)
        for place in self._places:
            if place.block == id(node) and not place.stop:
                made = ast.IfExp(
                    test=self._test(place, node),
                    body=self._taken(f"{_BOX}.pop()", node).value,
                    orelse=copy,
                )
                return ast.copy_location(made, node)
        return copy


# ---- a module ----------------------------------------------------------------------------------


def regions_of(module: nn.Module, rewriting: Rewriting) -> tuple[list[Region], list[Region]]:
    """Its regions as it is, and as if all were in evaluation mode."""
    own = vars(module)
    if type(own.get("_modules")) is not dict or not all(
        type(own.get(name)) in DICTIONARIES for name in ("_parameters", "_buffers")
    ):
        return [], []
    return rewriting.search(module, False).found, rewriting.search(module, True).found


def prepare(module: nn.Module) -> None:
    """Let the extension know the regions of a module as it is.

    It is called for a module of a class of ours of which nothing is known yet, or nothing that
    holds.
    """
    cls = type(module)
    rewriting = vars(cls).get("_rewriting")
    if not isinstance(rewriting, Rewriting):
        return
    for _ in range(3):  # a new region, or another thread, changes the class
        version, replaced = _C.class_version(cls), _C.replaced_functions()
        if not version or not rewriting.is_current() or refusal(rewriting.original):
            return
        states = regions_of(module, rewriting)
        numbers = rewriting.number(cls, (region.place for found in states for region in found))
        called = sequential.as_it_is(module, _STOCKS[_base(cls)], False)
        if _C.class_version(cls) == version and _C.replaced_functions() == replaced:
            for found in reversed(states):
                _keep(module, rewriting, called, replaced, numbers, found)
            return


def _keep(
    module: nn.Module,
    rewriting: Rewriting,
    called: tuple[Kind, bool],
    replaced: int,
    numbers: dict[_Place, int],
    regions: list[Region],
) -> None:
    made = tuple(
        (
            numbers[region.place],
            "forward" not in vars(module) and rewriting.is_whole(region.place),
            region.program,
            tuple(node.for_extension() for node in region.nodes),
            tuple(e.node for e in region.elements if e.layer.has_parameters),
        )
        for region in regions
        if region.place in numbers
    )
    globals_ = {name: value for region in regions for name, value in region.globals.items()}
    builtins_ = {name: value for region in regions for name, value in region.builtins.items()}
    source = rewriting.source
    function = source.function, source.code, tuple(globals_.items()), tuple(builtins_.items())
    _C.keep_regions(module, *called, replaced, function, made)
