"""The house: which folder may import which, which modules know of threads or torch, and sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": -1,  # the cellar: core raises them too
    "core": 0,
    "capture": 1, "architectures": 1,
    "interleave": 2,
    "tracing": 3,
    "models": 4,
    "analysis": 5, "storage": 5,
    "viz": 6, "harvesting": 6, "testing": 6,
    "distributed": 7,
    "cli": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip
MODULES = sorted((ROOT / "tracekit").rglob("*.py"))

KNOWS_THREADS = {
    "tracekit.interleave.baton", "tracekit.interleave.worker",
    "tracekit.distributed.client", "tracekit.distributed.server", "tracekit.distributed.stopping",
    "tracekit.distributed.supervisor", "tracekit.distributed.worker",
}  # fmt: skip
WITHOUT_TORCH = (
    "tracekit.errors",
    "tracekit.capture",
    "tracekit.interleave.protocol",
    "tracekit.interleave.mediator",
    "tracekit.interleave.interleaver",
)
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def name_of(path: Path) -> str:
    """`tracekit.core.site` for tracekit/core/site.py; `tracekit.core` for its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> tuple[str, int]:
    """The folder (or file) directly under tracekit that a module belongs to, and its floor."""
    folder = [*module.split("."), "__init__"][1]
    assert folder in FLOORS, f"tracekit/{folder} has no floor: give it one in {Path(__file__).name}"
    return folder, FLOORS[folder]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """The line and full name of all that a module imports, under TYPE_CHECKING too."""
    package = path.relative_to(ROOT).parent.parts
    known = {name_of(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield node.lineno, inner if inner in known else origin


@each_module
def test_a_module_imports_only_from_its_own_folder_or_lower_floors(path: Path) -> None:
    folder, floor = floor_of(name_of(path))
    upward = [
        f"line {line}: {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] == "tracekit"
        and floor_of(name)[0] != folder
        and floor_of(name)[1] >= floor
    ]
    assert not upward, f"floor {floor} imports from its own height or above"


@each_module
def test_only_the_baton_and_the_workers_know_of_threads(path: Path) -> None:
    roots = {name.split(".")[0] for _, name in imports_of(path)}
    assert name_of(path) in KNOWS_THREADS or not roots & {"threading", "_thread"}


@each_module
def test_capture_and_the_protocol_know_nothing_of_torch(path: Path) -> None:
    name = name_of(path)
    if any(name == bare or name.startswith(bare + ".") for bare in WITHOUT_TORCH):
        roots = {imported.split(".")[0] for _, imported in imports_of(path)}
        assert not roots & {"torch", "transformers", "accelerate", "safetensors"}


@each_module
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text("utf-8")
    long_functions = [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > LINES_OF_A_FUNCTION
    ]
    assert not long_functions, f"over {LINES_OF_A_FUNCTION} lines"
    assert len(source.splitlines()) <= LINES_OF_A_FILE


def test_the_rules_above_see_every_way_to_import(tmp_path: Path) -> None:
    """The parser of imports is itself checked, or the other tests here could never fail."""
    house = tmp_path / "tracekit" / "core"
    house.mkdir(parents=True)
    module = house / "site.py"
    module.write_text(
        "import tracekit.models.model\n"
        "from tracekit import errors\n"
        "from . import nest\n"
        "from ..tracing.envoy import Envoy\n"
        "def f():\n    from tracekit.viz import picture\n",
        "utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        patch.setitem(globals(), "MODULES", [tmp_path / "tracekit" / "errors.py"])
        assert set(imports_of(module)) == {
            (1, "tracekit.models.model"),
            (2, "tracekit.errors"),
            (3, "tracekit.core"),
            (4, "tracekit.tracing.envoy"),
            (6, "tracekit.viz"),
        }
