"""Make docs/pictures.md and its screenshots: what the code on that page shows, in Chromium.

    python tools/pictures.py [NAME ...]

What stands on the page is what was run. All of it is of the packaged model; nothing is loaded.
"""

from __future__ import annotations

import ast
import linecache
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402 - with matplotlib

from tracekit import Picture  # noqa: E402 - after the path

FOLDER = ROOT / "docs" / "pictures"
PAGE = ROOT / "docs" / "pictures.md"
WIDTH = 860  # pixels of a screenshot, before it is scaled
NARROW = 400

PREAMBLE = """\
import torch
from tracekit import LanguageModel, show
from tracekit.analysis import head_scores, integrated_gradients, logit_difference, logit_lens
from tracekit.analysis import patch_sweep, repeated_tokens

model = LanguageModel("tracekit/tiny")
prompt = "The Eiffel Tower is in the city of"
"""


@dataclass(frozen=True)
class Shown:
    """A section of the page: its code ends in the picture."""

    name: str
    heading: str
    text: str
    code: str
    views: tuple[str, ...] = ("light",)  # light, dark, narrow
    hover: str = ".tk-grid tbody tr:last-child td:last-child, .tk-image"  # what is pointed at
    point: dict[str, float] | None = None  # and where in it
    scale: float = 1.5  # pixels of the file for each of the screen


SECTIONS = (
    Shown(
        "lens",
        "Logit lens",
        "What each layer would say at each position, were it the last. A cell is the likeliest "
        "token, its colour the probability; pointing at it tells the next ones.",
        "show(logit_lens(model, prompt))",
        ("light", "dark", "narrow"),
    ),
    Shown(
        "sweep",
        "Patch sweep",
        "How far each patch carries the corrupted run to the clean one, from 0 to 1; the metric "
        "itself, what was computed and how it was checked stand beside and below.",
        """\
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(model, "Paris", "Rome")
        show(patch_sweep(model, clean, corrupted, metric, progress=False))
        """,
    ),
    Shown(
        "heads",
        "Small multiples",
        "Three axes are one heat map for each place of one of them (`panels=` says which).",
        """\
        over = ("layer", "position", "head")
        sweep = patch_sweep(model, clean, corrupted, metric, over, activation="z", progress=False)
        show(sweep.normalised(), title="z of each head, patched into the corrupted run")
        """,
        ("light", "dark"),
        ".tk-grid tbody tr:first-child td:last-child",
    ),
    Shown(
        "scores",
        "Head scores",
        "What kind of head each one is.",
        "show(head_scores(model))",
        hover=".tk-grid tbody tr:nth-child(3) td:nth-of-type(2)",
    ),
    Shown(
        "attention",
        "Attention",
        "One small picture for each head, from each token to those that it reads. On twelve random "
        "words, twice, the heads of layer 2 look behind the first copy: induction.",
        """\
        words = repeated_tokens(model, length=12, rows=1)
        logits, cache = model.run_with_cache(words, names_filter="pattern")
        show(cache, layer=2, tokens=model.to_str_tokens(words[0]))
        """,
        ("light", "dark"),
        ".tk-one:nth-child(2) .tk-image",
        {"x": 162, "y": 294},
    ),
    Shown(
        "tokens",
        "Tokens",
        "Text with a number for each token.",
        """\
        text = "The Eiffel Tower is in the city of Paris. The Colosseum is in the city of Rome."
        logits = model(text).logits[0].log_softmax(-1)
        ids = model.to_tokens(text)[0]
        surprise = -logits[:-1].gather(-1, ids[1:, None])[:, 0]
        show.tokens(model.to_str_tokens(text)[1:], surprise, what="surprise in nats")
        """,
        hover=".tk-flow span:nth-of-type(2)",
    ),
    Shown(
        "gradients",
        "Integrated gradients",
        "Labelled numbers with positions alone are such text, too.",
        "show(integrated_gradients(model, clean, metric))",
        hover=".tk-flow span:nth-of-type(5)",
    ),
    Shown(
        "modules",
        "The modules, with what a cache recorded",
        "Shape, mean, deviation and largest value of each module's output; what is no number is "
        "marked where it began. Layers alike are folded. Without a cache it is the tree alone.",
        """\
        with model.trace(prompt) as tracer:
            cache = tracer.cache()
            model.layers[3].mlp.output = model.layers[3].mlp.output / 0
        show(model, cache)
        """,
        ("light", "dark"),
    ),
    Shown(
        "graph",
        "What a block asked for",
        "The intervention graph: each request in the model's order, and the line that made it.",
        """\
        with model.trace(prompt) as tracer:
            hidden = model.layers[0].resid_post
            model.layers[1].attn_out[:] = 0
            model.layers[3].mlp.output = model.layers[2].mlp.output
        show(tracer.graph)
        """,
    ),
    Shown(
        "report",
        "Did the edit land?",
        "The report of a verified trace, what is wrong first. Here the first edit is one position "
        "off what was meant.",
        """\
        with model.trace(prompt, verify=True) as tracer:
            model.layers[1].attn_out[:, 3] = 0
            model.layers[2].mlp.output[:, -1] *= 3
        show(tracer.report.expect(positions=[2, -1]))
        """,
        ("light", "dark"),
        scale=1.15,
    ),
)

HEAD = """\
# Pictures

`show(thing)` makes the picture that fits. In a notebook it is HTML that needs no network and no
widget, follows the notebook's theme, and is read by pointing at it or with the arrow keys; in a
terminal it is text; `.save("x.html")`, `.save("x.png")` (with `pip install "tracekit[viz]"`) and
`.save("x.txt")` make files. This page is written by `tools/pictures.py`, which runs its code on the
packaged model and takes the screenshots in Chromium.

```python
{preamble}```
"""


def page() -> str:
    """The text of the page."""
    return "\n".join([HEAD.format(preamble=PREAMBLE), *map(_section, SECTIONS)])


def file_of(shown: Shown, view: str) -> Path:
    """Where a screenshot is."""
    return FOLDER / (f"{shown.name}.png" if view == "light" else f"{shown.name}-{view}.png")


def _section(shown: Shown) -> str:
    images = "\n\n".join(_image(shown, view) for view in shown.views)
    code = textwrap.dedent(shown.code).strip()
    text = textwrap.fill(shown.text, 100)
    return f"## {shown.heading}\n\n{text}\n\n```python\n{code}\n```\n\n{images}\n"


def _image(shown: Shown, view: str) -> str:
    label = shown.heading if view == "light" else f"{shown.heading}, {view}"
    return f"![{label}](pictures/{file_of(shown, view).name})"


def pictures() -> dict[str, Picture]:
    """What the code of the page shows, section by section."""
    names: dict[str, Any] = {}
    exec(PREAMBLE, names)
    return {shown.name: _run(shown, names) for shown in SECTIONS}


def _run(shown: Shown, names: dict[str, Any]) -> Picture:
    code = textwrap.dedent(shown.code).strip() + "\n"
    file = f"<{shown.name}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    *statements, last = ast.parse(code, file).body
    assert isinstance(last, ast.Expr)
    exec(compile(ast.Module(statements, []), file, "exec"), names)
    return eval(compile(ast.Expression(last.value), file, "eval"), names)


def main(chosen: Sequence[str]) -> None:
    """Write the page, and the screenshots of the chosen sections, or all."""
    from playwright.sync_api import sync_playwright

    PAGE.write_text(page(), "utf-8")
    every = pictures()
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as scratch:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for shown in SECTIONS:
            if not chosen or shown.name in chosen:
                saved = every[shown.name].save(Path(scratch) / "x.html")
                for view in shown.views:
                    _shoot(browser, saved, view, shown)
        browser.close()


def _shoot(browser: Any, saved: Path, view: str, shown: Shown) -> None:
    file = file_of(shown, view)
    width = NARROW if view == "narrow" else WIDTH
    view_page = browser.new_page(
        viewport={"width": width, "height": 1400},
        device_scale_factor=shown.scale,
        color_scheme="light" if view == "light" else "dark",
    )
    view_page.goto(saved.as_uri())
    view_page.add_style_tag(content="body{margin:0!important}.tk-viz{border-radius:0!important}")
    cell = view_page.locator(shown.hover).first
    if cell.count():
        cell.hover(position=shown.point)  # so that the page shows what pointing tells
    view_page.locator(".tk-viz").screenshot(path=file, animations="disabled")
    view_page.close()
    with Image.open(file) as image:
        image.convert("RGB").save(file, optimize=True)  # the same, and smaller
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
