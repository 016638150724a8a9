"""The page for who comes from nnsight: its tracekit code runs, and each block proves its claim."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "from_nnsight.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page_runs_as_printed(tmp_path: Path) -> None:
    script = tmp_path / "from_nnsight.py"
    script.write_text("\n".join(BLOCKS), "utf-8")
    names = runpy.run_path(str(script))
    assert len(names["hidden"]) == 2


def test_every_block_of_the_page_checks_something() -> None:
    assert len(BLOCKS) > 10
    assert [block for block in BLOCKS[1:] if "assert" not in block.lower()] == []
