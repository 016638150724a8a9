"""Each thing has its picture, with the numbers that it holds, as HTML and as text."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.viz.examples import PROMPT, TOKENS, attention, report
from tests.viz.reading import Element, read
from tracekit import LanguageModel, Picture, show
from tracekit.analysis import Lens, head_scores, logit_lens
from tracekit.errors import InputError


@pytest.fixture(scope="module")
def lens(model: LanguageModel) -> Lens:
    return logit_lens(model, PROMPT)


def rows_of(picture: Picture) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in read(picture.html).all("tr")[1:]]


def test_each_is_well_formed_small_and_needs_nothing_from_outside(
    pictures: Mapping[str, Picture],
) -> None:
    for name, picture in pictures.items():
        html = read(picture.html)
        assert html.all("div")[0]["class"] == "tk-viz" and picture.text, name
        links = [each for tag in ("a", "link", "script", "img") for each in html.all(tag)]
        addresses = [e.attributes.get(key) or "" for e in links for key in ("href", "src")]
        assert all(not each or each.startswith("data:image/png;base64,") for each in addresses)
        assert "@import" not in picture.html and "fetch(" not in picture.html
        assert len(picture.html.encode()) < (120_000 if name == "much attention" else 60_000), name


def test_each_is_saved_as_png(pictures: Mapping[str, Picture], tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    for name, picture in pictures.items():
        written = picture.save(tmp_path / f"{name}.png").read_bytes()
        assert written.startswith(b"\x89PNG") and len(written) > 4000


def test_what_has_no_picture_is_told_what_has() -> None:
    with pytest.raises(InputError, match=r"no picture of dict. What can be shown: labelled num"):
        show({})


# -- attention ----------------------------------------------------------------------------------


def test_small_patterns_have_a_cell_for_each_weight() -> None:
    pattern = attention(2, 7)
    cells = read(show(pattern, tokens=TOKENS).html).all("td")
    told = [cell["title"].rpartition(": ") for cell in cells]
    assert [float(number) for *_, number in told] == pytest.approx(pattern.flatten().tolist())
    assert (
        told[8][0] == "head 0, 1 ·Eiffel → 1 ·Eiffel" and told[14][0] == "head 0, 2 \\n → 0 <bos>"
    )
    text = show(pattern, tokens=TOKENS).text
    assert f"{pattern[1, 6, 2]:.2f}" in text and "head 1" in text


def test_queries_are_the_last_of_the_keys() -> None:
    step = attention(2, 7)[:, -1:]
    titles = [cell["title"] for cell in read(show(step, tokens=TOKENS).html).all("td")]
    assert titles[0].startswith("head 0, 6 日本 → 0 <bos>: ")


@pytest.mark.parametrize("is_causal", [True, False])
def test_large_patterns_keep_every_weight_in_a_few_bytes(is_causal: bool) -> None:
    pattern = attention(3, 90) if is_causal else attention(3, 90) @ attention(3, 90).mT
    html = read(show(pattern / pattern.max()).html)
    assert not html.all("td") and len(html.all("img")) == 6  # light and dark
    images = [each for each in html.all("div") if each.attributes.get("class") == "tk-image"]
    for image, head in zip(images, pattern / pattern.max(), strict=True):
        kind = {"2": "<f2", "4": "<f4"}[image["data-bytes"]]
        numbers = np.frombuffer(base64.b64decode(image["data-numbers"]), kind).astype("float32")
        shown = np.zeros((90, 90), "float32")
        shown[np.tril_indices(90) if is_causal else np.nonzero(shown == 0)] = numbers
        assert np.allclose(shown, head.numpy(), rtol=1e-3, atol=1e-7)
        assert image["aria-label"].startswith("head ") and "90 by 90 numbers" in image["aria-label"]


def test_the_strongest_weights_of_a_large_pattern_are_told_as_text() -> None:
    pattern = torch.zeros(1, 40, 40)
    pattern[0, 30, 7] = 0.75
    assert "  head 0, 30 → 7: 0.75" in show(pattern).text


def test_attention_that_is_none_is_refused(model: LanguageModel) -> None:
    _, named = model.run_with_cache(PROMPT, names_filter="pattern")
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (named, {}, "of which layer .* layer= is one of 0, 1, 2, 3"),
        (named, {"layer": 1, "tokens": TOKENS}, "7 tokens, and a pattern of 9 keys"),
        (torch.zeros(2, 3, 4, 4), {}, r"\[heads, queries, keys\], not \[2, 3, 4, 4\]"),
    ]
    for thing, options, told in refused:
        with pytest.raises(InputError, match=told):
            show(thing, **options)


# -- lens, sweep, scores ------------------------------------------------------------------------


def test_a_lens_has_the_likeliest_token_in_each_cell_and_the_next_ones_behind(lens: Lens) -> None:
    html = read(show(lens).html)
    cells = html.all("td")
    words = [cell[0] for row in lens.words for cell in row]
    assert [cell.text for cell in cells] == words
    assert [float(cell["title"].split("\n")[0].split()[-1]) for cell in cells] == pytest.approx(
        lens.top.values[..., 0].flatten().tolist()
    )
    assert cells[-1]["title"].startswith("layer 3, position 8 of: Paris 0.99")
    assert f"then {lens.words[-1][-1][1]} " in cells[-1]["title"]
    lines = show(lens).text.splitlines()
    assert any(line.startswith("3 ") and line.endswith(" Paris 1.00") for line in lines)
    assert any("3 0.998 (rank 0)" in line for line in lines)


def test_of_a_long_prompt_the_last_positions_are_shown_and_it_is_said(
    lens: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracekit.viz.lens.MOST", 20)
    cells = read(show(lens).html).all("td")
    assert len(cells) == 20 and cells[-1]["title"].startswith("layer 3, position 8 of: Paris")
    assert "the last 4 of 9 positions" in show(lens).text


def test_a_sweep_says_how_far_each_patch_goes_and_the_metric(
    pictures: Mapping[str, Picture],
) -> None:
    cells = read(pictures["sweep"].html).all("td")
    ends = [float(cell["title"].rpartition("'Rome' ")[2]) for cell in cells]
    shares = [float(cell.text) for cell in cells]
    facts = dict(
        zip(
            *([e.text for e in read(pictures["sweep"].html).all(t)] for t in ("dt", "dd")),
            strict=True,
        )
    )
    clean, corrupted = float(facts["metric, clean run"]), float(facts["metric, corrupted run"])
    for share, metric in zip(shares, ends, strict=True):
        assert share == pytest.approx((metric - corrupted) / (clean - corrupted), abs=0.01)
    assert max(shares) > 0.9 and facts["checked"] == "no patch was recomputed whole"


def test_head_scores_are_three_maps_of_one_scale(model: LanguageModel) -> None:
    scores = head_scores(model, rows=2)
    html = read(show(scores).html)
    every = [scores.induction, scores.previous_token, scores.duplicate_token]
    numbers = [float(cell["title"].rpartition(": ")[2]) for cell in html.all("td")]
    assert numbers == pytest.approx([v for kind in every for v in kind.values.flatten().tolist()])
    assert len(html.all("table")) == 3 and len(html.all("b")) == 1


# -- modules ------------------------------------------------------------------------------------


def lines_of(picture: Picture) -> dict[str, list[str]]:
    """The name of each line of a tree, and what stands in its columns."""
    lines = [
        each
        for tag in ("div", "summary")
        for each in read(picture.html).all(tag)
        if "tk-line" in (each.attributes.get("class") or "").split()
    ]
    spans = [[e for e in line.below if isinstance(e, Element)] for line in lines]
    return {line[0].text.split(" ")[0]: [each.text for each in line[1:]] for line in spans}


def test_modules_are_counted_and_layers_alike_are_folded(model: LanguageModel) -> None:
    picture = show(model)
    lines = lines_of(picture)
    block = sum(weight.numel() for weight in model.module.transformer.h[0].parameters())
    assert (
        lines["0"] == [f"4 x {block / 1000:.0f} k"] and "0 … 3 4 x GPT2Block, alike" in picture.text
    )
    assert lines["ln_f"] == ["256"] and picture.html.count("c_attn") == 1
    assert len(read(picture.html).all("details")) >= 6


def test_a_module_is_shown_by_itself_and_tied_weights_are_counted_once(
    model: LanguageModel,
) -> None:
    assert (
        show(model.transformer.h[0]).text.splitlines()[2].startswith("model.transformer.h.0 GPT2B")
    )
    picture = show(model)
    (head,) = (line for line in picture.text.splitlines() if line.lstrip().startswith("lm_head"))
    assert head.split() == ["lm_head", "Linear", "=", "model.transformer.wte.weight", "0"]


def test_statistics_are_those_of_what_hooks_see(model: LanguageModel) -> None:
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    names = ("transformer.ln_f", "transformer.wte", "lm_head")
    hooks = [model.module.get_submodule(n).register_forward_hook(note(n)) for n in names]
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache()
    for hook in hooks:
        hook.remove()
    lines = lines_of(show(model, cache))
    for name in names:
        _, shape, *numbers = lines[name.rpartition(".")[2]]
        value = seen[name].detach()
        assert shape == f"{list(value.shape)} float32"
        expected = [
            value.mean().item(),
            value.std(correction=0).item(),
            value.abs().max().item(),
            0,
        ]
        assert [float(each) for each in numbers] == pytest.approx(expected, rel=0.05)


def test_what_is_infinite_is_marked_as_such(model: LanguageModel) -> None:
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.transformer.drop])
        model.transformer.drop.output[0, 0, 0] = -torch.inf
    *_, mean, _, largest, nans = lines_of(show(model, cache))["drop"]
    assert largest == "inf" and nans == "0" and abs(float(mean)) < 1


def test_what_is_no_number_is_marked_where_it_began(pictures: Mapping[str, Picture]) -> None:
    lines = lines_of(pictures["statistics"])
    assert lines["lm_head"][2:] == ["nan", "nan", "nan", str(9 * 356)]
    assert lines["wte"][-1] == "0"
    marked = [
        e for e in read(pictures["statistics"].html).all("span") if "tk-bad" in str(e.attributes)
    ]
    assert len(marked) == 6 * 4  # mlp of the last layer, the layer, the norm, the rest


# -- graph and reports --------------------------------------------------------------------------


def test_a_graph_has_its_requests_in_order_with_their_lines(
    pictures: Mapping[str, Picture],
) -> None:
    rows = rows_of(pictures["graph"])
    assert [row[2] for row in rows] == ["cache", "read", "edit", "read", "write"]
    assert rows[1][1] == "model.layers[1].attn_out[:] = 0" and rows[2][:2] == ["", ""]
    assert rows[-1][3:] == ["model.transformer.h.3.mlp.output", "[1, 9, 128] float32"]
    numbers = [int(row[0]) for row in rows if row[0]]
    assert numbers == sorted(numbers)
    for cell in itertools.chain(*rows):
        assert cell in pictures["graph"].text


def test_a_report_says_what_is_wrong_first_and_then_all_it_knows() -> None:
    picture = show(report())
    html = read(picture.html)
    verdicts = [e for e in html.all("div") if "tk-verdict" in (e.attributes.get("class") or "")]
    assert verdicts[0].text == "NOT VERIFIED: overwritten. 1 of 2 edits landed as written."
    assert "tk-bad" in verdicts[0]["class"] and verdicts[1].text.startswith(
        "overwritten (edit 1): "
    )
    rows = [[cell.text for cell in row.all("td")] for row in html.all("table")[0].all("tr")[1:]]
    assert rows[0][2:5] == [
        "h[0] = '<b>'",
        "1 of 1",
        f"{report().edits[0].what}: row 0, position 1 ·Eiffel",
    ]
    assert rows[0][5:] == ["0.125", "1.50", "read by model.layers.2, in the cache", "as written"]
    assert rows[1][7:] == ["overwritten by line 8", "overwritten"]
    shifts = html.all("table")[1].all("td")
    assert [cell.text for cell in shifts] == ["<bos>", "·Eiffel", "\\n"]
    assert shifts[2]["title"] == "row 0, position 2: \\n 0.5"
    for told in ("12 values", "bit-identical", "position 2: ·a → ·b", "2 forward passes", "a note"):
        assert told in picture.text and told in html.text


def test_a_verification_names_the_sites_that_do_not_agree(model: LanguageModel) -> None:
    with model.generate(PROMPT, max_new_tokens=2) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0]])
    picture = show(cache.verify())
    assert picture.text.splitlines()[1].startswith("VERIFIED. 1 of 1 sites agree")
    assert rows_of(picture)[0][0] == "model.transformer.h.0.output"
