"""Which versions are installed, beside those that tracekit declares that it needs."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, final

_PYPROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"
# Nothing depends on them; what they would bring is not there without them.
OPTIONAL: Final = {
    "matplotlib": "pictures as PNG",
    "ipython": "pictures in notebooks",
}


@final
@dataclass(frozen=True)
class Version:
    """One package: what is installed ("" for nothing), what is wanted, and what to do about it."""

    name: str
    installed: str
    wanted: str
    is_right: bool | None  # None: nothing is wanted of it
    cure: str = ""


def versions() -> Iterator[Version]:
    """Python, tracekit, what it declares, and what it can use."""
    declared, python = _declared()
    own: str = importlib.import_module("tracekit").__version__
    yield _version("python", platform.python_version(), python, f"install Python {python}")
    yield Version("tracekit", own, "", None)
    for each in declared:
        yield _of(each)
    for name, use in OPTIONAL.items():
        found = _installed(name)
        yield Version(name, found, "", None, "" if found else f'for {use}: pip install "{name}"')


def source() -> str:
    """Where it is said what is wanted."""
    if _PYPROJECT.exists():
        return str(_PYPROJECT)
    return "the installed package" if _metadata() is not None else "nowhere: not installed"


def _declared() -> tuple[list[str], str]:
    """The requirements, and that of Python: of the checkout, else of the installed package."""
    if _PYPROJECT.exists():
        text = _PYPROJECT.read_text("utf-8")
        block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        python = re.search(r'^requires-python = "(.*?)"', text, re.MULTILINE)
        lines = block[1] if block else ""
        found = re.findall(r'^\s*"([^"]+)"', lines, re.MULTILINE)
        return found, python[1] if python else ""
    about = _metadata()
    if about is None:
        return [], ""
    wanted = [each for each in metadata.requires("tracekit") or () if "extra ==" not in each]
    return wanted, _python_of(about)


def _metadata() -> metadata.PackageMetadata | None:
    try:
        return metadata.metadata("tracekit")
    except metadata.PackageNotFoundError:
        return None


def _python_of(about: metadata.PackageMetadata) -> str:
    return (about.get_all("Requires-Python") or [""])[0]


def _of(requirement: str) -> Version:
    name, specifier = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement.partition(";")[0]).groups()  # pyright: ignore[reportOptionalMemberAccess] - every requirement begins with a name
    return _version(name, _installed(name), specifier.strip(), f'pip install "{name}{specifier}"')


def _version(name: str, installed: str, wanted: str, cure: str) -> Version:
    is_right = _fits(installed, wanted) if installed else False
    return Version(name, installed, wanted, is_right, cure if is_right is False else "")


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _fits(installed: str, wanted: str) -> bool | None:
    """Whether a version is among those wanted; None where that can't be told."""
    try:
        from packaging.specifiers import SpecifierSet  # transformers brings it
    except ImportError:
        return None
    return SpecifierSet(wanted).contains(installed, prereleases=True)
