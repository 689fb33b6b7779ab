"""The examples in the docstrings run, and every public function and class has one."""

import doctest
import importlib
import inspect

import pytest

MODULES = [
    "mylayers",
    "mylayers._extension",
    "mylayers.convert",
    "mylayers.distributed",
    "mylayers.functional",
    "mylayers.layers",
    "mylayers.onnx",
    "mylayers.optimization",
    "mylayers.reference",
    "mylayers.sequential",
    "mylayers.training",
]
PUBLIC = [
    (module.__name__, name)
    for module in map(
        importlib.import_module,
        [
            "mylayers.distributed",
            "mylayers.functional",
            "mylayers.layers",
            "mylayers.sequential",
            "mylayers.training",
        ],
    )
    for name in module.__all__
]
FINDER = doctest.DocTestFinder(exclude_empty=False)


def _run(test: doctest.DocTest) -> doctest.TestResults:
    printed = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert results.failed == 0, "".join(printed)
    return results


# torch.onnx.export's own use of its pytree module.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is:FutureWarning")
@pytest.mark.parametrize("name", MODULES)
def test_every_example_of_the_module_runs(name):
    for test in FINDER.find(importlib.import_module(name)):
        _run(test)


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda text: text)
def test_public_name_has_an_example_that_runs(module, name):
    assert module in MODULES  # whose examples the test above runs
    of = importlib.import_module(module)
    value = getattr(of, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    assert {test.name: test for test in FINDER.find(of)}[f"{module}.{name}"].examples
