"""Which versions a figure was measured with."""

from __future__ import annotations

import platform
from importlib import metadata


def versions() -> str:
    """Of Python, torch, transformers and the rivals, in a line."""
    packages = ("torch", "transformers", "nnsight", "transformer-lens")
    found = [f"{package} {_version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
