"""README runs as printed, and shows what it prints; it and ARCHITECTURE point to what exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> str:
    """All blocks of README in this language, one after the other."""
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))


def test_the_code_prints_what_the_readme_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "readme.py"
    script.write_text(blocks("python"), "utf-8")
    capsys.readouterr()
    runpy.run_path(str(script))
    shown = blocks("text")
    assert shown.count("\n") > 5
    assert capsys.readouterr().out == shown


def test_every_link_of_the_readme_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_map_of_the_readme_is_the_repository() -> None:
    (drawing,) = re.findall(r"^```\n(tracekit/\n.*?)^```$", README, re.MULTILINE | re.DOTALL)
    inside = re.findall(r"^  ([\w.]+)/? ", drawing, re.MULTILINE)
    found = [path.name for path in (ROOT / "tracekit").iterdir() if path.name[0] not in "_."]
    assert sorted(inside) == sorted(set(found) - {"py.typed"})
    beside = re.findall(r"^(\w+)/", drawing, re.MULTILINE)
    assert [folder for folder in beside if not (ROOT / folder).is_dir()] == []


def test_the_house_of_architecture_names_every_file() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = dict(re.findall(r"^\| \w+ \| `(\w+)/` \| (.*) \|$", page, re.MULTILINE))
    folders = [path for path in (ROOT / "tracekit").iterdir() if path.name[0] not in "_."]
    assert sorted(rooms) == sorted(folder.name for folder in folders if folder.is_dir())
    unnamed = [
        f"{folder}/{file.name}"
        for folder, words in rooms.items()
        for file in (ROOT / "tracekit" / folder).glob("[a-z]*.py")
        if not re.search(rf"\b{file.stem}\b", words)
    ]
    assert unnamed == []


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_the_commands_of_the_readme_are_in_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
