"""The source of a function, proved to be what runs, and functions made of changed sources.

What a debugger would show need not be what runs: files change, decorators and tools exchange code.
So the source is compiled, and what comes of it is compared with the code of the function.
"""

import __future__

import ast
import functools
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

__all__ = ["Source", "in_place_of", "made", "read"]

_OF_FUTURE = (
    functools.reduce(
        operator.or_,
        (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names),
    )
    & ~inspect.CO_NESTED
)  # which once was a feature
# Whether a function stands in a class or in another function.
_OF_PLACE = inspect.CO_NESTED | 0x800_0000
_RUNS_LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_WRAPPER = "__mylayers_of"


@dataclass(frozen=True)
class Source:
    """A function as it is written.

    Attributes:
        function: the function.
        code: that it had when it was read.
        tree: its definition, without decorators.
        imported: names that its file imports, of whose attributes CPython compiles other calls.
    """

    function: FunctionType
    code: CodeType
    tree: ast.FunctionDef
    imported: tuple[str, ...]


def read(function: object) -> Source | str:
    """A function's source, or why there is none."""
    if type(function) is not FunctionType:
        return f"it is of {type(function).__name__}, not a function"
    code = function.__code__
    if "__wrapped__" in vars(function):
        return "it is decorated"
    if code.co_flags & _RUNS_LATER:
        return "it is a generator or a coroutine"
    try:
        lines, first = inspect.getsourcelines(code)
        imported = _imported("".join(inspect.findsource(code)[0]))
        indented = lines[0][:1].isspace()
        tree = ast.parse("if True:\n" * indented + "".join(lines))
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return "its source is not there"
    statement: ast.AST = tree.body[0]
    if indented:
        assert isinstance(statement, ast.If)
        statement = statement.body[0]
    if not isinstance(statement, ast.FunctionDef):
        return "it is not written as a function"
    ast.increment_lineno(tree, first - 1 - indented)
    statement.decorator_list = []
    found = Source(function, code, statement, imported)
    try:
        compiled = _compiled(found, statement, code.co_freevars)
    except (SyntaxError, ValueError):
        return "its source does not stand by itself"
    if not _same(compiled, code):
        return "it is decorated, or its source is not what runs"
    return found


@functools.lru_cache(maxsize=8)
def _imported(text: str) -> tuple[str, ...]:
    """The names that a file imports, outside of functions and classes."""
    try:
        waiting: list[ast.AST] = [ast.parse(text)]
    except (SyntaxError, ValueError):
        return ()
    names: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = None
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            waiting.extend(ast.iter_child_nodes(node))
    names.pop("*", None)
    return tuple(names)


def _compiled(source: Source, tree: ast.FunctionDef, free: tuple[str, ...]) -> CodeType:
    """The code of a definition, as that of a function which has these free variables."""
    outer = ast.FunctionDef(
        name=_WRAPPER,
        args=ast.arguments(
            posonlyargs=[],
            args=[ast.arg(arg=name) for name in free],
            kwonlyargs=[],
            kw_defaults=[],
            defaults=[],
        ),
        # Defaults and annotations belong to the function, not to its code.
        body=[_bare(tree)],
        decorator_list=[],
    )
    if "type_params" in ast.FunctionDef._fields:
        outer.type_params = []  # type: ignore[attr-defined]
    imports = [ast.Import(names=[ast.alias(name="m", asname=name)]) for name in source.imported]
    module = ast.fix_missing_locations(ast.Module(body=[*imports, outer], type_ignores=[]))
    code: CodeType = compile(
        module,
        source.code.co_filename,
        "exec",
        flags=source.code.co_flags & _OF_FUTURE,
        dont_inherit=True,
    )
    for name in (_WRAPPER, tree.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def _bare(tree: ast.FunctionDef) -> ast.FunctionDef:
    """A definition without what is evaluated where it stands: defaults and annotations."""

    def bare(argument: ast.arg) -> ast.arg:
        return ast.copy_location(ast.arg(arg=argument.arg), argument)

    given = tree.args
    arguments = ast.arguments(
        posonlyargs=[bare(a) for a in given.posonlyargs],
        args=[bare(a) for a in given.args],
        vararg=given.vararg and bare(given.vararg),
        kwonlyargs=[bare(a) for a in given.kwonlyargs],
        kw_defaults=[None for _ in given.kw_defaults],
        kwarg=given.kwarg and bare(given.kwarg),
        defaults=[],
    )
    made = ast.FunctionDef(name=tree.name, args=arguments, body=tree.body, decorator_list=[])
    if "type_params" in ast.FunctionDef._fields:
        made.type_params = []  # type: ignore[attr-defined]
    return ast.copy_location(made, tree)


_COMPARED = (
    "co_code",
    "co_name",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_exceptiontable",
)


def _same(a: Any, b: Any) -> bool:
    """Whether two codes, or constants of codes, do the same."""
    if type(a) is not type(b):
        return False
    if type(a) is CodeType:
        return (
            (a.co_flags ^ b.co_flags) & ~_OF_PLACE == 0
            and all(getattr(a, name, None) == getattr(b, name, None) for name in _COMPARED)
            and _same(a.co_consts, b.co_consts)
        )
    if type(a) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is frozenset:
        return _same(tuple(sorted(a, key=repr)), tuple(sorted(b, key=repr)))
    return bool(repr(a) == repr(b) if type(a) in (float, complex) else a == b)


def made(source: Source, tree: ast.FunctionDef, names: Mapping[str, Any]) -> FunctionType:
    """A function as this one, of another definition, with these names known to it besides."""
    known = source.code.co_freevars
    free = (*known, *names)
    code = _compiled(source, tree, free)
    cells = dict(zip(known, source.function.__closure__ or (), strict=True))
    cells.update((name, CellType(value)) for name, value in names.items())
    function: Any = source.function
    changes: dict[str, Any] = {"co_firstlineno": source.code.co_firstlineno}
    if hasattr(code, "co_qualname"):
        changes["co_qualname"] = source.code.co_qualname  # type: ignore[attr-defined]
    result = FunctionType(
        code.replace(**changes),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def in_place_of(function: FunctionType, template: Any, **cells: Any) -> FunctionType:
    """The function that a template makes of these, to stand where another one stood.

    Who asks for its signature, its source or its globals is told those of the other.
    """
    made = template(**cells)
    result = FunctionType(
        made.__code__, function.__globals__, function.__name__, None, made.__closure__
    )
    return functools.update_wrapper(result, function)  # type: ignore[return-value]
