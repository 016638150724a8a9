"""The independent way: a plain forward over a generation's tokens, hooked by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tests.matrix.spec import IMAGE_TOKEN
from tests.tiny_models import SPECS
from tests.tracing.plain import changing

PADDING = 3  # columns, of the last row
# Their axes of positions are derived from the mask, and from where the images are.
OWN_POSITIONS = {"qwen2_5_vl", "qwen3_vl"}
# The type that a new token has, where it is not the type of what was before it.
TYPES_OF_NEW = {"paligemma": 1, "gemma3": 0, "qwen2_5_vl": 0, "qwen3_vl": 0}


def blocks_of(name: str) -> str:
    """The path of the list of blocks that generate (an encoder's are not those)."""
    layers = SPECS[name].layers
    return next((path for path in layers if "language" in path or "text" in path), layers[-1])


def is_double(name: str) -> bool:
    """Whether a decoder of its own reads what was generated."""
    return SPECS[name].family == "encdec" or name == "whisper"


def arguments(name: str, inputs: dict[str, Any], is_padded: bool = False) -> dict[str, Any]:
    """What generate() is given, the last row padded as its family has it."""
    spec = SPECS[name]
    given = {**spec.gen_inputs(inputs), **spec.generation, "do_sample": False}
    if spec.family == "vlm":
        given["suppress_tokens"] = [IMAGE_TOKEN]
    if not is_padded:
        return given
    if is_double(name):
        mask = given["attention_mask"].clone()
        mask[-1, -PADDING:] = 0
        return {**given, "attention_mask": mask}
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in given:
            given[key] = torch.cat([torch.zeros_like(given[key][:, :PADDING]), given[key]], 1)
    rows = len(given["input_ids"])
    if rows > 1:  # the other rows have tokens there
        given["input_ids"][:-1, :PADDING] = 90
        given["attention_mask"][:-1, :PADDING] = 1
    return given


def composed(name: str, module: Any, given: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The arguments of one forward over `tokens`, `[rows, length]`, a prompt and what is new."""
    inputs = {key: given[key] for key in given if isinstance(given[key], Tensor)}
    inputs["use_cache"] = False
    if "use_cache" not in inspect.signature(module.forward).parameters:
        del inputs["use_cache"]
    if is_double(name):
        return {**inputs, "decoder_input_ids": tokens}
    count = tokens.shape[1] - given["input_ids"].shape[1]
    inputs["input_ids"] = tokens
    mask = given["attention_mask"]
    mask = inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in given:
            new = torch.full_like(given[key][:, :1], TYPES_OF_NEW[name]).expand(-1, count)
            inputs[key] = torch.cat([given[key], new], 1)
    has_positions = "position_ids" in inspect.signature(module.forward).parameters
    if has_positions and not bool(mask.all()) and name not in OWN_POSITIONS:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def first_of(value: Any) -> Tensor:
    """The hidden states in what a module returned."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def added_where(mask: Tensor, vector: Tensor) -> Callable[[Any], Any]:
    """What a plain hook does: adds `vector` where `mask`, `[rows, columns]`, says so."""

    def change(output: Any) -> Any:
        hidden = first_of(output).clone()
        hidden[mask] += vector[: hidden.shape[-1]]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return change


def run_plainly(
    module: nn.Module,
    inputs: dict[str, Any],
    paths: Iterable[str],
    edited: str = "",
    change: Callable[[Any], Any] | None = None,
) -> dict[str, Tensor]:
    """The hidden states that plain hooks see at `paths`, `change` made to what `edited` gives."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Any], None]:
        def look(output: Any) -> None:
            seen[path] = first_of(output).detach().clone()

        return look

    with ExitStack() as hooks, torch.no_grad():
        if change is not None:
            hooks.enter_context(changing(module.get_submodule(edited), change))
        for path in paths:
            hooks.enter_context(changing(module.get_submodule(path), keep(path)))
        module(**inputs)
    return seen
