"""Heat maps say every number, in cells, in their titles and as text; and escape every label."""

from __future__ import annotations

import base64
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.viz.browsers import lacking
from tests.viz.examples import TOKENS, heads, heat
from tests.viz.reading import Element, read
from tracekit import Picture, show
from tracekit.analysis import Axis, Labelled
from tracekit.errors import InputError, UnsupportedError


def cells_of(picture: Picture) -> list[Element]:
    return read(picture.html).all("td")


def told(cell: Element) -> float:
    """The number in a cell's title."""
    number = cell["title"].rpartition(": ")[2]
    return math.nan if number.startswith("not a number") else float(number)


def test_every_number_is_in_its_cell_with_all_its_digits_in_the_title() -> None:
    found = heat()
    cells = cells_of(show(found))
    numbers = torch.tensor([told(cell) for cell in cells], dtype=found.values.dtype)
    assert torch.equal(numbers.nan_to_num(7.0), found.values.flatten().nan_to_num(7.0))
    for cell, value in zip(cells, found.values.flatten().tolist(), strict=True):
        assert (
            cell.text == str(value)
            if not math.isfinite(value)
            else abs(float(cell.text) - value) <= 0.005
        )


def test_a_title_names_the_place_and_says_where_there_is_no_number() -> None:
    titles = [cell["title"] for cell in cells_of(show(heat()))]
    assert titles[0] == "layer 0, position 0 <bos>: -1.25"
    assert titles[8].startswith("layer 1, position 1 ·Eiffel: ")
    assert titles[9] == "layer 1, position 2 \\n: not a number (nan)"
    assert titles[20] == "layer 2, position 6 日本: inf"


def test_labels_are_escaped_and_what_is_invisible_is_shown() -> None:
    html = show(heat()).html
    assert html.count("<script") == html.count("</script>") == 1  # its own
    heads = [cell.text for cell in read(html).all("thead")[0].all("th")[1:]]
    assert heads == ["<bos>", "·Eiffel", "\\n", TOKENS[3], "·& \"'", "\\x1b[31m", "日本"]


def test_nothing_in_it_asks_for_a_network_and_nothing_has_an_id() -> None:
    html = show(heat()).html
    assert not any(word in html for word in ("http", "//", "@import", "fetch", "url(", " id="))
    assert len(html.encode()) < 20_000


def test_colours_are_around_0_with_both_signs_and_from_0_with_one() -> None:
    both = [cell["class"] for cell in cells_of(show(heat()))]
    assert both[0] == "d9" and both[9] == "tk-nan" and both[20] == "d32"
    one = [cell["class"] for cell in cells_of(show(heads()))]
    assert one[0] == "s0" and one[-1] == "s32"
    legend = read(show(heads()).html).all("b")[0]
    assert [tick.text for tick in legend.all("span")] == ["0", "0.488", "0.976"]


def test_the_ends_of_the_colours_can_be_given() -> None:
    cells = cells_of(show(heads().at(head=0), low=0.0, high=10.0))
    assert {cell["class"] for cell in cells} == {"s0", "s1", "s2", "s3"}


def test_three_axes_are_small_multiples_and_panels_says_of_which() -> None:
    of_heads = read(show(heads()).html)
    assert len(of_heads.all("table")) == 2
    assert [table.all("td")[1]["title"] for table in of_heads.all("table")] == [
        "head 0, layer 0, position 1 ·Eiffel: 0.04761905",
        "head 1, layer 0, position 1 ·Eiffel: 0.071428575",
    ]
    assert len(read(show(heads(), panels="layer").html).all("table")) == 3
    with pytest.raises(InputError, match="panels='heads' is no axis; there are layer, position"):
        show(heads(), panels="heads")


def test_positions_alone_are_running_text() -> None:
    picture = show.tokens(TOKENS, torch.arange(7.0), what="surprise")
    tokens = read(picture.html).all("p")[0].all("span")
    assert [token.text for token in tokens][:3] == ["<bos>", "·Eiffel", "\\n"]
    assert [told(token) for token in tokens] == list(range(7))
    assert all(f"{label} {value}" in picture.text for label, value in [("<bos>", 0), ("日本", 6)])
    with pytest.raises(InputError, match=r"7 tokens, and values of shape \[3\]"):
        show.tokens(TOKENS, [1.0, 2.0, 3.0])


def test_the_text_holds_the_same_numbers_and_no_colours() -> None:
    picture = show(heat())
    for cell in cells_of(picture):
        assert cell.text in picture.text.split()
    assert "\x1b" not in picture.text and "\x1b" not in repr(picture)
    assert max(map(len, picture.text.splitlines())) <= 100


def test_a_terminal_sees_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in [("TERM", "xterm-256color"), ("COLORTERM", "truecolor"), ("COLUMNS", "60")]:
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = repr(show(heat())).splitlines()
    assert any("\x1b[38;2;" in line for line in lines)
    assert "\x1b[31m" not in repr(show(heat()))  # that of a token
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in repr(show(heat()))


def test_many_columns_are_folded_and_none_is_lost() -> None:
    wide = Labelled(torch.arange(60.0)[None], [Axis("layer", ("0",)), Axis("head", ("w",) * 60)])
    text = show(wide).text
    assert all(f" {number}.0" in text for number in range(60))
    assert max(map(len, text.splitlines())) <= 100


def test_it_is_saved_as_a_page_text_or_png(tmp_path: Path) -> None:
    picture = show(heat(), title="<b>")
    page = read(picture.save(tmp_path / "x.html").read_text("utf-8"))
    assert page.all("title")[0].text == "<b>" and len(page.all("td")) == 21
    assert picture.save(tmp_path / "x.txt").read_text("utf-8").rstrip("\n") == picture.text
    with pytest.raises(InputError, match=r"saved as .html, .png or .txt, not .pdf: 'x.pdf'"):
        picture.save(tmp_path / "x.pdf")


def test_a_png_has_the_colours_of_its_cells(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    from tracekit.viz.colours import palette

    pixels = image.imread(show(heat()).save(tmp_path / "x.png"))
    there = {tuple(each) for each in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    for level in (9, 32):  # the first cell, and the infinite one
        colour = palette("diverging")[level]
        assert tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) in there


def test_without_matplotlib_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r'pip install "tracekit\[viz\]"'):
        show(heat()).save(tmp_path / "x.png")


@pytest.mark.parametrize("shape", [(), (2, 2, 2, 2), (0, 3)])
def test_what_is_no_heat_map_says_how_to_make_it_one(shape: tuple[int, ...]) -> None:
    axes = [Axis(f"axis {at}", ("x",) * size) for at, size in enumerate(shape)]
    with pytest.raises(InputError, match=r"a heat map has 1, 2 or 3 axes .* found.at\(layer=3\)"):
        show(Labelled(torch.zeros(shape), axes))


def test_no_numbers_at_all_and_all_alike_are_shown_too() -> None:
    axes = [Axis("layer", ("0", "1"))]
    for values in (torch.full((2,), float("nan")), torch.zeros(2), torch.full((2,), 5.0)):
        picture = show(Labelled(values, axes))
        assert len(cells_of(picture)) == 2 and picture.text


def test_a_notebook_gets_html_and_rich_gets_text() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    picture = show(heads().at(head=0))
    data, _ = formatters.DisplayFormatter().format(picture)
    assert data == {"text/html": picture.html, "text/plain": picture.text}
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(picture)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in written.splitlines()] == picture.text.splitlines()


def test_large_heat_maps_are_images_with_their_numbers_beside_them() -> None:
    values = torch.linspace(-2e5, 3e5, 12 * 400).reshape(12, 400)
    axes = [Axis("layer", tuple(map(str, range(12)))), Axis("position", ("w",) * 400)]
    picture = show(Labelled(values, axes))
    image = next(e for e in read(picture.html).all("div") if e.attributes.get("data-numbers"))
    numbers = np.frombuffer(base64.b64decode(image["data-numbers"]), "<f4")
    assert image["data-bytes"] == "4" and (numbers == values.flatten().numpy()).all()
    assert "the largest is layer 11, position 399 w: 300000.0" in image["aria-label"]
    assert len(picture.html) < 60_000


def test_a_browser_that_is_missing_is_a_failure_in_ci_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        lacking("no browser")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        lacking("no browser")
