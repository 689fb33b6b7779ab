"""The pages: links lead somewhere, paths exist, examples run, and what is generated is current."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "csrc/*/README.md")
    for page in ROOT.glob(pattern)
)
NAMES = sorted({str(page.relative_to(ROOT)) for page in PAGES})
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# "[words](target)", pictures as well.
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path of this repository, in backticks; NAME is a place to fill.
ROOTS = "csrc|mylayers|tests|docs|benchmarks|build_support|examples|\\.ci"
QUOTED = re.compile(rf"`((?:{ROOTS})/[\w./-]+\.\w+)`")


def prose(page):
    return FENCE.sub("", page.read_text())


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    found, seen = set(), {}
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        count = seen[anchor] = seen.get(anchor, -1) + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


def broken_links(page):
    """The local links of a page that lead nowhere."""
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_local_link_leads_to_a_file_and_a_heading(name):
    assert broken_links(ROOT / name) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A `code` heading, twice\n## Twice\n## Twice\n")
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#a-code-heading-twice) [c](other.md#twice-1)\n"
        "[d](#here)\n"
        "[e](https://example.org) ![f](no.png) [g](other.md#twice-2) [h](#there)\n"
        "```\n[i](no.md)\n```\n"
    )
    assert broken_links(page) == ["no.png", "other.md#twice-2", "#there"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_path_that_is_named_exists(name):
    named = {path for path in QUOTED.findall(prose(ROOT / name)) if "NAME" not in path}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "csrc/cpu"])
def test_a_folders_page_names_each_of_its_files(folder):
    page = (ROOT / folder / "README.md").read_text()
    files = {file.name for kind in ("py", "h", "cpp") for file in (ROOT / folder).glob(f"*.{kind}")}
    assert {name for name in files if f"`{name}`" not in page} <= {"__init__.py"}


def test_every_lab_page_that_the_code_names_exists():
    sources = [
        file for file in (ROOT / "csrc").rglob("*.*") if file.suffix in {".h", ".cpp", ".cu"}
    ]
    named = {
        name for file in sources for name in re.findall(r"\[lab: ([\w-]+)\]", file.read_text())
    }
    named.discard("NAME")  # how to read them
    assert "skinny-gemm" in named
    lab = ROOT / "docs" / "lab"
    assert sorted(name for name in named if not list(lab.glob(f"????-??-{name}.md"))) == []


def test_every_page_can_be_reached_from_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(prose(index))}
    pages = {page for page in PAGES if "docs" in page.relative_to(ROOT).parts} - {index}
    assert sorted(page.name for page in pages - linked) == []


@pytest.mark.parametrize("name", ["README.md", "docs/layers.md"])
def test_every_example_of_the_page_runs(name):
    printed = []
    test = doctest.DocTestParser().get_doctest((ROOT / name).read_text(), {}, name, name, 0)
    results = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert results.attempted > 5
    assert results.failed == 0, "".join(printed)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_every_decision_is_short():
    text = prose(ROOT / "docs" / "decisions.md")
    decisions = re.split(
        r"^### ", re.sub(r"^## .*$", "", text, flags=re.MULTILINE), flags=re.MULTILINE
    )
    assert len(decisions) > 20
    long = [part.splitlines()[0] for part in decisions[1:] if len(part.strip().splitlines()) > 13]
    assert long == []


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "lab").glob("2*.md")), ids=lambda p: p.stem
)
def test_every_lab_page_says_what_was_asked_and_on_what(page):
    text = page.read_text()
    missing = [
        word for word in ("Question", "CPU", "Software", "Command") if f"**{word}.**" not in text
    ]
    assert missing == []


@pytest.fixture(scope="module")
def publish():
    """It is run from the repository's root, not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("benchmarks.publish")
    finally:
        sys.path.remove(str(ROOT))


def test_the_pages_of_speed_are_those_of_the_results(publish):
    for page, text in publish.pages(publish.published()).items():
        assert page.read_text() == text, "run python -m benchmarks.publish"


def test_the_results_are_small(publish):
    files = [file for file in publish.RESULTS.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {
        "results.csv",
        "run.json",
        "speedups.png",
        "roofline.png",
    }
    assert sum(file.stat().st_size for file in files) < 2 << 20
