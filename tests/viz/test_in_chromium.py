"""Pictures in a real browser: what is seen, what pointing tells, in the dark, in little room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.viz.examples import TOKENS, heads, heat
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


NARROW = {
    "heat map": lambda: show(heat()),
    "small multiples": lambda: show(heads()),
    "tokens": lambda: show.tokens(TOKENS * 5, range(35), what="surprise"),
}


@pytest.mark.parametrize("name", NARROW)
def test_at_400_pixels_nothing_is_cut_off_and_the_page_does_not_scroll_sideways(
    opened: Open, name: str
) -> None:
    page = opened(NARROW[name](), width=400)
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
        """() => [...document.querySelectorAll(".tk-viz :is(th, td, p span)")].map(e => {
            const style = getComputedStyle(e); return [style.color, style.backgroundColor]})"""
    )
    solid = [(ink, paper) for ink, paper in pairs if paper.startswith("rgb(")]
    assert solid and all(contrast(to_hex(ink), to_hex(paper)) >= 4.5 for ink, paper in solid)


def to_hex(colour: str) -> str:
    parts = colour.removeprefix("rgb(").removesuffix(")").split(", ")
    return "#" + "".join(f"{int(part):02x}" for part in parts)
