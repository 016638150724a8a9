"""In a notebook a picture is shown once, as HTML, and its text is text."""

from __future__ import annotations

import builtins

import pytest
import torch

from tests.viz.examples import TOKENS, attention, heat
from tests.viz.reading import read
from tracekit import show
from tracekit.analysis import Axis, Labelled


class ZMQInteractiveShell:
    """A notebook's shell, as rich tells one: by the name of its class."""


def test_asking_for_its_text_displays_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = show(heat())
    outside = repr(picture), picture.text
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    assert (repr(picture), picture.text) == outside
    assert all(outside) and capsys.readouterr().out == ""


def test_one_axis_of_words_goes_down_and_one_of_numbers_across() -> None:
    values = torch.tensor([0.5, -1.0, 2.0])
    words = read(show(Labelled(values, [Axis("component", ("embed", "0_attn_out", "b"))])).html)
    assert [row.all("th")[0].text for row in words.all("tr")[1:]] == ["embed", "0_attn_out", "b"]
    titles = [cell["title"] for cell in words.all("td")]
    assert titles == ["component embed: 0.5", "component 0_attn_out: -1.0", "component b: 2.0"]
    layers = read(show(Labelled(values, [Axis("layer", ("0", "1", "2"))])).html)
    assert [each.text for each in layers.all("tr")[1].all("th")] == [""]
    assert [each.text for each in layers.all("tr")[0].all("th")] == ["layer", "0", "1", "2"]


def test_one_head_by_itself_is_not_numbered() -> None:
    pattern = attention(3, 7)
    assert "head" not in show(pattern[2], tokens=TOKENS).text
    assert "head 0" in show(pattern[2:], tokens=TOKENS).text
