"""Pictures in a real browser: what is seen, what pointing tells, in the dark, in little room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.viz.examples import attention, heads, heat
from tracekit import Picture, show
from tracekit.viz.colours import contrast, palette, text_on

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """The one page in which all is opened."""
    with browser.new_context() as context:
        yield context.new_page()


@pytest.fixture
def opened(page: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a Picture, or some HTML; fails if it complains, or asks for anything but itself."""
    complaints: list[str] = []
    files = (tmp_path / f"{number}.html" for number in count())
    listeners = {
        "console": lambda message: complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: complaints.append(request.url) if is_outside(request) else None,
    }
    for event, listener in listeners.items():
        page.on(event, listener)

    def open_one(shown: Picture | str, *, theme: str = "light", width: int = 900) -> Any:
        path = next(files)
        if isinstance(shown, Picture):
            shown.save(path)
        else:
            path.write_text(shown, "utf-8")
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size({"width": width, "height": 700})
        page.mouse.move(0, 0)
        page.goto(path.as_uri())
        return page

    yield open_one
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    assert not complaints


def is_outside(request: Any) -> bool:
    """Whether it is for more than the page itself and what is written in it."""
    return request.resource_type != "document" and not request.url.startswith("data:")


def rgb(colour: str) -> str:
    return "rgb(" + ", ".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5)) + ")"


def style(element: Any, name: str) -> str:
    return element.evaluate(f"e => getComputedStyle(e)['{name}']")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_cells_have_the_colours_of_their_numbers_and_text_that_can_be_read(
    opened: Open, theme: Any
) -> None:
    page = opened(show(heat()), theme=theme)
    colours = palette("diverging", theme)
    for place, level in ((0, 9), (20, 32)):
        cell = page.locator("td").nth(place)
        assert style(cell, "backgroundColor") == rgb(colours[level])
        assert style(cell, "color") == rgb(text_on(colours[level]))
    assert "repeating-linear-gradient" in style(page.locator("td").nth(9), "backgroundImage")
    legend = style(page.locator(".tk-bar i"), "backgroundImage")
    assert legend.startswith(f"linear-gradient(90deg, {rgb(colours[0])}, ")
    assert legend.endswith(f", {rgb(colours[-1])})")


def test_pointing_at_a_cell_tells_it_and_marks_its_row_and_column(opened: Open) -> None:
    page = opened(show(heat()))
    page.locator("td").nth(8).hover()
    assert page.locator(".tk-say").inner_text() == "layer 1, position 1 ·Eiffel: 0.45000005"
    assert page.locator(".tk-hot").all_inner_texts() == ["·Eiffel", "1"]
    page.locator("td").nth(9).hover()
    assert page.locator(".tk-say").inner_text() == "layer 1, position 2 \\n: not a number (nan)"
    assert page.locator(".tk-hot").count() == 2


def test_the_keyboard_reads_cells_too(opened: Open) -> None:
    page = opened(show(heat()))
    page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator(".tk-say").inner_text() == "layer 0, position 2 \\n: -0.825"
    assert page.evaluate("document.activeElement.getAttribute('role')") == "group"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_notebooks_theme_counts_more_than_the_systems(opened: Open, theme: Any) -> None:
    other = {"light": "dark", "dark": "light"}[theme]
    around = {
        f'data-jp-theme-light="{str(theme == "light").lower()}"': theme,
        f'class="vscode-{theme}"': theme,
        f'data-theme="{theme}"': theme,
        "": other,
    }
    for attribute, expected in around.items():
        page = opened(f"<!doctype html><body {attribute}>{show(heat()).html}", theme=other)
        cell = page.locator("td").first
        assert style(cell, "backgroundColor") == rgb(palette("diverging", expected)[9])


def test_pointing_at_an_image_tells_the_weight_there(opened: Open) -> None:
    pattern, tokens = attention(2, 128), [f" w{place}" for place in range(128)]
    page = opened(show(pattern, tokens=tokens))
    image = page.locator(".tk-image").nth(1)
    box = image.bounding_box()
    step = box["width"] / 128
    assert box["height"] == box["width"] == 384
    for row, column in ((0, 0), (127, 64), (100, 3), (5, 90)):
        page.mouse.move(box["x"] + (column + 0.5) * step, box["y"] + (row + 0.5) * step)
        place, _, number = page.locator(".tk-say").inner_text().rpartition(": ")
        assert place == f"head 1, {row} ·w{row} → {column} ·w{column}"
        assert float(number) == pytest.approx(float(pattern[1, row, column]), rel=5e-3, abs=6e-8)
    image.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".tk-say").inner_text().startswith("head 1, 6 ·w6 → 90 ·w90: ")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_image_of_a_theme_is_seen_and_has_its_colours(opened: Open, theme: Any) -> None:
    pattern = torch.eye(60)[None]
    page = opened(show(pattern), theme=theme)
    seen = [image for image in page.locator("img").all() if image.is_visible()]
    assert [image.get_attribute("class") for image in seen] == [f"tk-{theme}"]
    pixels = seen[0].evaluate(
        """e => { const c = document.createElement("canvas"); [c.width, c.height] = [60, 60];
            const d = c.getContext("2d"); d.drawImage(e, 0, 0);
            const data = d.getImageData(7, 7, 1, 2).data;
            return [[...data.slice(0, 3)], [...data.slice(4, 7)]] }"""
    )
    colours = palette("sequential", theme)
    assert [f"rgb({', '.join(map(str, pixel))})" for pixel in pixels] == [
        rgb(colours[-1]),
        rgb(colours[0]),
    ]


def test_a_tree_opens_and_closes_and_its_columns_stay_in_line(
    opened: Open, pictures: Mapping[str, Picture]
) -> None:
    page = opened(pictures["modules"])
    inner = page.get_by_text("ln_1")
    for key, is_visible in (("Enter", True), ("Space", False), ("Enter", True)):
        page.locator("summary", has_text="0 … 3").press(key)
        assert inner.is_visible() == is_visible
    rights = page.evaluate(
        """() => [...document.querySelectorAll(".tk-line")].filter(e => e.offsetParent).map(e =>
            e.children[1].getBoundingClientRect().right)"""
    )
    assert len(rights) > 10 and max(rights) - min(rights) < 1


# What JupyterLab's style says of tables, lists and images in an output, in short.
LAB = """.lab table{border-collapse:collapse;border-spacing:0;table-layout:fixed;margin:0 auto 1em}
.lab td,.lab th,.lab tr{vertical-align:middle;padding:.5em;line-height:normal;text-align:right;
white-space:normal;max-width:none;border:none;font-weight:bold}.lab tbody tr:nth-child(odd){
background:#f00}.lab img{max-width:50%;margin:9px}.lab dl,.lab p{margin:1em}
.lab dt{font-weight:bold}body{font:20px serif;line-height:3}"""


@pytest.mark.parametrize("name", ["heat map", "attention", "report", "tokens", "much attention"])
def test_a_notebooks_style_changes_nothing(
    opened: Open, pictures: Mapping[str, Picture], name: str
) -> None:
    boxes = """() => [...document.querySelectorAll(".tk-part :not(tr)")].map(e => {
        const b = e.getBoundingClientRect(), c = getComputedStyle(e);
        return [b.width, b.height, c.backgroundColor, c.fontWeight, c.textAlign, c.fontSize] })"""
    html = f'<body style="margin:0"><div class="lab">{pictures[name].html}</div>'
    alone = opened("<!doctype html>" + html).evaluate(boxes)
    assert opened(f"<!doctype html><style>{LAB}</style>{html}").evaluate(boxes) == alone


def test_pictures_on_one_page_do_not_disturb_each_other_nor_the_page(opened: Open) -> None:
    plain = '<table id="own"><tr><td class="s3">mine</td></tr></table>'
    pictures = [show(heat()), show(heat()), show(heads().at(head=0))]
    page = opened("<!doctype html>" + plain + "".join(each.html for each in pictures))
    own = page.locator("#own td")
    assert style(own, "backgroundColor") == "rgba(0, 0, 0, 0)" and own.inner_text() == "mine"
    for number, first in enumerate(("-1.25", "-1.25", "0.0")):
        page.locator(".tk-viz").nth(number).locator("td").first.hover()
        said = page.locator(".tk-say").all_inner_texts()
        assert said[number].endswith(f": {first}") and not any(said[number + 1 :])


KINDS = (
    *("heat map", "small multiples", "tokens", "attention", "much attention", "lens", "modules"),
    *("statistics", "graph", "report", "sweep", "head scores", "gradients"),
)


def test_every_kind_is_looked_at(pictures: Mapping[str, Picture]) -> None:
    assert set(KINDS) == set(pictures)


@pytest.mark.parametrize("name", KINDS)
def test_at_400_pixels_nothing_is_cut_off_and_the_page_does_not_scroll_sideways(
    opened: Open, pictures: Mapping[str, Picture], name: str
) -> None:
    page = opened(pictures[name], width=400, theme="dark" if KINDS.index(name) % 2 else "light")
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    heights = """() => [...document.querySelectorAll(".tk-grid tr")].map(e => e.clientHeight)"""
    narrow = page.evaluate(heights)
    page.set_viewport_size({"width": 900, "height": 700})
    assert page.evaluate(heights) == narrow  # no label is squeezed
    page.set_viewport_size({"width": 400, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".tk-viz *")].filter(e =>
            getComputedStyle(e).overflowX != "auto" && e.clientWidth &&
            e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
    )
    assert not cut
    moved = page.evaluate(
        """() => [...document.querySelectorAll("table.tk-grid")].flatMap(t => {
            const box = t.parentNode; box.scrollLeft = box.scrollWidth;
            const left = box.getBoundingClientRect().left;
            return [...t.tBodies[0].rows].map(r => r.cells[0].getBoundingClientRect().left - left)
        })"""
    )
    assert all(abs(each) <= 3 for each in moved)  # the labels of rows stay where they are
    pairs = page.evaluate(
        """() => [...document.querySelectorAll(".tk-viz :is(th, td, span, dt, dd, div)")]
            .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
                const ink = getComputedStyle(e).color; let at = e, paper;
                do { paper = getComputedStyle(at).backgroundColor; at = at.parentNode }
                while (paper == "rgba(0, 0, 0, 0)"); return [ink, paper] })"""
    )
    assert pairs and all(
        contrast(to_hex(ink), to_hex(paper)) >= 4.5 for ink, paper in set(map(tuple, pairs))
    )


def to_hex(colour: str) -> str:
    parts = colour.removeprefix("rgb(").removesuffix(")").split(", ")
    return "#" + "".join(f"{int(part):02x}" for part in parts)
