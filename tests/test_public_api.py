"""The public names: a list that changes only on purpose, each explained, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tracekit

PUBLIC = [
    "Activations",
    "Cache",
    "EditReport",
    "Entries",
    "Entry",
    "Envoy",
    "FactoredMatrix",
    "Graph",
    "Harvest",
    "KeyValueCache",
    "KeyValueEntry",
    "LanguageModel",
    "Model",
    "Note",
    "Operation",
    "Outcome",
    "Picture",
    "Plan",
    "PlannedSite",
    "Prefix",
    "Source",
    "Stream",
    "TokenSequence",
    "Tracer",
    "TracekitError",
    "TracekitWarning",
    "Verification",
    "backward",
    "connect",
    "errors",
    "harvest",
    "load_activations",
    "load_cache",
    "save",
    "serve",
    "settings",
    "show",
]


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(tracekit.__all__) == sorted(PUBLIC)


def test_dir_shows_every_public_name() -> None:
    assert set(PUBLIC) <= set(dir(tracekit))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(tracekit, name)
    assert (value.__doc__ or "").strip(), f"tracekit.{name} is not explained"


@pytest.mark.parametrize("heavy", ["transformers", "accelerate", "IPython", "matplotlib"])
def test_importing_tracekit_imports_nothing_heavy_but_torch(heavy: str) -> None:
    code = (
        "import sys, tracekit\n"
        "for name in tracekit.__all__: getattr(tracekit, name)\n"
        f"sys.exit({heavy!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"import tracekit imports {heavy}"
