"""The rooms of docs/architecture.md: who imports whom, how long files are, where the geographic packages are needed."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GEOGRAPHIC = {"rasterio", "geopandas", "shapely", "pyogrio", "pyproj", "fiona"}
# (importing file, imported file); the exception that the page names.
EXCEPTION = re.search(
    r"There is one exception: `([\w./]+)` imports `([\w./]+)`, inside `PseLTae_pretrained", PAGE
).groups()


def rooms() -> dict[str, int]:
    """Places of folders and scripts in the table, from the ground up."""
    table = PAGE.split("## Rooms")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", table, flags=re.M)
    return {
        name.rstrip("/"): place for place, cell in enumerate(cells) for name in re.findall(r"`([^`]+)`", cell)
    }


ROOMS = rooms()
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ROOMS
    for path in [ROOT / room, *(ROOT / room).rglob("*.py")]
)
FILES = [name for name in FILES if name.endswith(".py")]
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}


def imported_names(name: str, tree: ast.AST) -> Iterator[str]:
    """Full names of all that the import statements of a file name: modules, or things in them."""
    package = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(name: str, source: str) -> set[str]:
    """The repository's files that one of them imports."""
    return {MODULES[found] for found in imported_names(name, ast.parse(source)) if found in MODULES} - {name}


def place(name: str) -> int:
    """The room of a file, by its place in the table."""
    return ROOMS[name.split("/")[0]]


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports from a room that is higher up in the house."""
    return sorted(
        (file, other) for file, others in graph.items() for other in others if place(other) > place(file)
    )


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


GRAPH = {name: arrows(name, read(name)) for name in FILES}


def test_every_file_has_a_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert packages | scripts == set(ROOMS)
    assert len(FILES) > 80 and len(set(ROOMS.values())) == 10


def test_imports_never_point_up_but_for_the_exception() -> None:
    assert upward(GRAPH) == [EXCEPTION]


def test_imports_never_run_in_a_circle() -> None:
    without = {
        file: others - ({EXCEPTION[1]} if file == EXCEPTION[0] else set()) for file, others in GRAPH.items()
    }
    try:
        TopologicalSorter(without).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_such_imports_would_be_found() -> None:
    """In functions, for type checkers alone, relative, and of a package."""
    assert arrows("data/store.py", "def f():\n    from learning import engine\n") >= {"learning/engine.py"}
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dataset import PixelSetData\n"
    assert arrows("data/store.py", typing) == {"dataset.py"}
    assert arrows("models/fast/pooling.py", "from .. import layers\nfrom ..ltae import LTAE\n") >= {
        "models/layers.py",
        "models/ltae.py",
    }
    assert arrows("data/store.py", "import models.layers as l") == {"models/layers.py"}
    up = {"data/store.py": {"dataset.py"}, "train.py": {"figure2.py", "common/files.py"}}
    assert upward(up) == [("data/store.py", "dataset.py")]


def test_no_file_is_too_long() -> None:
    lengths = {name: read(name).count("\n") for name in FILES if not name.startswith("tests/")}
    assert {name: n for name, n in lengths.items() if n > 350 or (name == "dataset.py" and n >= 300)} == {}


def test_learning_has_few_files() -> None:
    assert len([name for name in FILES if name.startswith("learning/")]) <= 12


def test_geographic_packages_are_imported_where_they_are_needed() -> None:
    found = {}
    for name in FILES:
        at_top = [
            node for node in ast.parse(read(name)).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {other.split(".")[0] for node in at_top for other in imported_names(name, node)}
        if names & GEOGRAPHIC and not name.startswith(("tests/", "benchmarks/")):
            found[name] = sorted(names & GEOGRAPHIC)
    assert any(name.startswith("preprocessing/images/") for name in found)
    assert {
        name: names for name, names in found.items() if not name.startswith("preprocessing/images/")
    } == {}
