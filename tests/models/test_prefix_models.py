"""Every generating model of the matrix: a run behind a prefix is the run without, or is refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import IS_TRANSFORMERS_5, NAMES, SPECS, make
from tracekit import LanguageModel, Prefix
from tracekit.errors import PaddingError, UnsupportedError
from tracekit.models.behind import start_of
from tracekit.models.kv_layers import layers_of, tensors_of

GENERATING = [name for name in NAMES if SPECS[name].generate]
WITH_MEDIA = {"vlm", "audio"}
# Why a prompt can't be shared: what the model keeps, or how it reads.
REFUSED = {
    "bamba": "not known to go on",
    "blip_2": "returns no keys",
    "jamba": "not known to go on",
    "mamba": "not known to go on",
    "paligemma": "in both directions",
    "recurrent_gemma": "returns no keys",
    "rwkv": "returns no keys",
    "xlstm": "can't be kept in",
}
REFUSED_BEFORE_5 = {
    **REFUSED,
    "bamba": "returns no keys",
    "falcon_h1": "returns no keys",
    "jamba": "returns no keys",
    "lfm2": "can't be kept in",
    "mamba": "can't be kept in",
    "mamba2": "can't be kept in",
    "qwen3_next": "can't be kept in",
    "t5gemma": "computes something else",
    "zamba2": "can't be kept in",
}
IS_REFUSED = REFUSED if IS_TRANSFORMERS_5 else REFUSED_BEFORE_5
SHARED = [name for name in GENERATING if name not in IS_REFUSED]
NOT_GENERATING = {"mamba2": "does not go on", "whisper": "in a way of its own"}
WITH_STATES = {"falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "qwen3_next", "zamba2"}
WITH_WINDOWS = {
    "cohere2",
    "gemma2",
    "gemma3_text",
    "gpt_neo",
    "gpt_oss",
    "llama4_text",
    "mistral",
}
# In transformers 4 experts are chosen by masks, so no dry run can tell shapes or rows of them.
RUN_DRY = [name for name in SHARED if IS_TRANSFORMERS_5 or SPECS[name].family != "moe"]
REST = 4


@dataclass
class Case:
    """A tiny model, a prompt for it, and rests of one length."""

    name: str
    module: nn.Module
    prompt: dict[str, Any]
    decodes: bool

    @property
    def key(self) -> str:
        return "decoder_input_ids" if self.decodes else "input_ids"

    @property
    def ids(self) -> Tensor:
        return self.prompt[self.key]

    def rest(self, rows: int, seed: int = 1) -> Tensor:
        return ids(rows, REST, seed)

    def whole(self, rest: Tensor) -> dict[str, Tensor]:
        """The inputs of one row: the prompt and a rest behind it."""
        found = {**self.prompt, self.key: torch.cat([self.ids, rest], 1)}
        if not self.decodes:
            found["attention_mask"] = torch.ones_like(found[self.key])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in found:
                more = found[name].new_zeros(1, rest.shape[1])
                found[name] = torch.cat([found[name], more], 1)
        return found


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 60, (rows, length), generator=generator)


def case(name: str) -> Case:
    module, inputs = make(name)
    decodes = bool(module.config.is_encoder_decoder)
    if decodes:
        prompt = {key: value[:1] for key, value in inputs.items()}
        prompt["decoder_input_ids"] = ids(1, 6)
        prompt["decoder_input_ids"][:, 0] = start_of(module)
    elif SPECS[name].family in WITH_MEDIA:
        prompt = inputs
    else:
        prompt = {"input_ids": ids(1, 9)}
    return Case(name, module, prompt, decodes)


def logits_of(output: Any) -> Tensor:
    return output.logits.detach()


def behind(model: LanguageModel, own: Case, rest: Tensor, prefix: Prefix) -> Tensor:
    with model.trace(**{own.key: rest}, prefix=prefix):
        out = model.output
    return logits_of(out)


def checksum(prefix: Prefix) -> str:
    found = hashlib.sha256()
    for layer in layers_of(prefix._kv_cache):
        for tensor in tensors_of(layer):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", GENERATING)
def test_a_trace_behind_a_prefix_is_the_trace_of_all_or_is_refused(name: str) -> None:
    own = case(name)
    model = LanguageModel(own.module)
    if name in IS_REFUSED:
        with pytest.raises(UnsupportedError, match=IS_REFUSED[name]):
            model.prefill(**own.prompt)
        return
    prefix = model.prefill(**own.prompt)
    before = checksum(prefix)
    for rows, has_grad in [(1, False), (3, False), (3, True)]:
        rest = own.rest(rows)
        with torch.set_grad_enabled(has_grad):
            out = behind(model, own, rest, prefix)
        for row in range(rows):
            with torch.no_grad():
                plain = logits_of(own.module(**own.whole(rest[row : row + 1]), use_cache=False))
            torch.testing.assert_close(out[row], plain[0, -REST:], atol=1e-5, rtol=1e-4)
    assert checksum(prefix) == before


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_a_generation_behind_a_prefix_is_that_of_all_or_is_refused(
    name: str, options: dict[str, Any]
) -> None:
    own = case(name)
    model = LanguageModel(own.module)
    prefix = model.prefill(**own.prompt)
    before = checksum(prefix)
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    rest = own.rest(2)
    if name in NOT_GENERATING:
        with pytest.raises(UnsupportedError, match=NOT_GENERATING[name]):
            model.generate(**{own.key: rest}, prefix=prefix, **options)
        return
    tokens = model.generate(**{own.key: rest}, prefix=prefix, **options)
    for row in range(2):
        plain = own.module.generate(**own.whole(rest[row : row + 1]), **options)
        assert torch.equal(tokens[row], plain[0])
    assert checksum(prefix) == before


@pytest.mark.parametrize("name", SHARED)
def test_an_extended_prefix_is_that_of_the_longer_text(name: str) -> None:
    own = case(name)
    model = LanguageModel(own.module)
    more, rest = ids(1, 3, 7), own.rest(1)
    longer = model.prefill(**own.prompt).extend(more)
    assert torch.equal(longer.tokens, torch.cat([own.ids, more], 1))
    out = behind(model, own, rest, longer)
    with torch.no_grad():
        plain = own.module(**own.whole(torch.cat([more, rest], 1)), use_cache=False)
    torch.testing.assert_close(out, logits_of(plain)[:, -REST:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in RUN_DRY if SPECS[name].family not in WITH_MEDIA])
def test_rests_of_different_lengths_are_what_they_are_alone_or_are_refused(
    name: str, side: str
) -> None:
    own = case(name)
    model = LanguageModel(own.module, padding_side=side)
    prefix = model.prefill(**own.prompt)
    rests = [ids(1, length, length) for length in (5, 3, 1)]
    outs: list[Tensor] = []
    try:
        with model.trace(prefix=prefix) as tracer:
            for rest in rests:
                with tracer.invoke(**{own.key: rest}):
                    outs.append(model.output.logits)
    except PaddingError:
        assert name in WITH_STATES or (side == "left" and name in WITH_WINDOWS)
        return
    assert name not in WITH_STATES
    for rest, out in zip(rests, outs, strict=True):
        length = rest.shape[1]
        with torch.no_grad():
            plain = logits_of(own.module(**own.whole(rest), use_cache=False))[:, -length:]
        is_behind = side == "left" and not own.decodes
        found = out[:, -length:] if is_behind else out[:, :length]
        torch.testing.assert_close(found.detach(), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RUN_DRY)
def test_a_scan_behind_a_prefix_has_the_shape_of_the_trace(name: str) -> None:
    own = case(name)
    model = LanguageModel(own.module)
    prefix = model.prefill(**own.prompt)
    before = checksum(prefix)
    with model.scan(**{own.key: own.rest(2)}, prefix=prefix):
        shape = model.output.logits.shape
    assert tuple(shape)[:2] == (2, REST)
    assert checksum(prefix) == before
