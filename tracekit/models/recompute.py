"""The inputs of one forward pass over the tokens that a generation has ended with."""

# What generation computes in many steps, this pass computes in one: each token sees the tokens
# before it, at the same positions, with the same images, sounds and encoder inputs. So padding in
# front of a row and behind its end is masked, positions are counted in each row, rows are repeated
# as beams and num_return_sequences repeat them, and the types of tokens go on as in decoding.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tracekit.core.nest import map_leaves, tensors
from tracekit.core.quirks import (
    generation_config_of,
    infers_the_mask_of_an_encoder,
    part_that_generates,
    type_of_new_tokens,
)
from tracekit.errors import UnsupportedError
from tracekit.models.images import repeat_images
from tracekit.models.padding import with_positions
from tracekit.models.signatures import accepts, generates_with, takes_more

# What a forward takes, and what only says how to generate, or what to return.
_NOT_OF_THE_PASS: Final = frozenset(
    {
        "cache_params",
        "cache_position",
        "inputs",
        "labels",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "return_dict",
        "use_cache",
    }
)
# What tells the token that stands for an image or a sound, and the input in which that is.
_PLACEHOLDERS: Final = {
    "image_token_id": "pixel_values",
    "image_token_index": "pixel_values",
    "video_token_id": "pixel_values_videos",
    "audio_token_id": "input_features",
    "audio_token_index": "input_features",
}
# The tokens that are generated behind, by each of the names under which they are given.
_OF_TOKENS: Final = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_OF_DECODER: Final = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
_TYPES: Final = ("token_type_ids", "mm_token_type_ids")


def forward_inputs(
    module: Any,
    given: dict[str, Any],
    sequences: Tensor,
    *,
    new_tokens: Tensor | None = None,
    include_last: bool = True,
) -> dict[str, Any]:
    """The keyword arguments of one forward pass of `module` over `sequences`.

    `given` is all that `module.generate(**given)` was given, by name, and `sequences`, `[rows,
    tokens]`, are the tokens that it ended with: the prompt in front (an encoder-decoder's start
    token, too), or the new ones alone where the prompt was `inputs_embeds`. `new_tokens`, `[rows]`,
    says how many new tokens each row has; without it a row goes to its first end-of-sequence token.
    The logits at each position are then those that generation chose the next token by, without its
    processors. `include_last=False` leaves the last column out, as no step of generation had it.

    Raises UnsupportedError where the arguments don't tell what belongs to which row.
    """
    given = _with_mask_of_encoder(module, _by_one_name(module, given))
    _refuse_part_of_a_prompt(given)
    mask = valid_tokens(module, given, sequences, new_tokens=new_tokens)
    _refuse_new_placeholders(module, given, sequences)
    repeats = len(sequences) // _rows(module, given)
    kept = {name: value for name, value in given.items() if _is_of_the_pass(module, name, value)}
    inputs = _repeated(module, kept, given, repeats)
    inputs = _with_tokens(module, inputs, given, sequences, mask)
    if not include_last:
        inputs = _without_last(inputs, mask.shape[1])
    if accepts(module, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def valid_tokens(
    module: Any, given: dict[str, Any], sequences: Tensor, *, new_tokens: Tensor | None = None
) -> Tensor:
    """Which positions hold a token of their row, `[rows, positions]`: True but for padding.

    Padding is in front of a row, or behind its end. Positions are those of the forward pass: where
    the prompt was `inputs_embeds`, they begin with it, though `sequences` do not.
    """
    given = _by_one_name(module, given)
    prompt = _mask_of_prompt(module, given, sequences)
    start = prompt_length(module, given, sequences)
    count = sequences.shape[1] - start
    if new_tokens is None:
        new_tokens = count_new_tokens(module, given, sequences)
    columns = torch.arange(count, device=sequences.device)
    own = columns < new_tokens.to(sequences.device)[:, None]
    repeats = len(sequences) // len(prompt)
    prompt = prompt.to(sequences.device).repeat_interleave(repeats, 0)
    return torch.cat([prompt != 0, own], 1)


def count_new_tokens(module: Any, given: dict[str, Any], sequences: Tensor) -> Tensor:
    """How many new tokens each row has, as far as the tokens tell, `[rows]`.

    Up to its first end-of-sequence token, with it. Beams that a stopping criterion has ended are
    filled up, which tells their end (the first token for it passes for one of theirs if it is an
    end-of-sequence token); other rows that one has ended are not told from those that go on.
    """
    new = sequences[:, prompt_length(module, given, sequences) :]
    ends = end_tokens(module, given)
    count = up_to_end(new, ends)
    has_criteria = bool(given.get("stopping_criteria") or given.get("stop_strings"))
    if not has_criteria or not is_beam_search(module, given):
        return count
    pad = generation_settings(module, given).pad_token_id
    is_own = (new >= 0) & (new != (-1 if pad is None or pad in ends else pad))
    columns = torch.arange(1, new.shape[1] + 1, device=new.device)
    return torch.minimum(count, (is_own * columns).amax(1))


def is_beam_search(module: Any, given: dict[str, Any]) -> bool:
    """Whether sequences are made of beams, which come and go while it runs."""
    return (generation_settings(module, given).num_beams or 1) > 1


def prompt_length(module: Any, given: dict[str, Any], sequences: Tensor) -> int:
    """How many columns of `sequences` there were before the first new token."""
    given = _by_one_name(module, given)
    if not has_decoder_inputs(module):
        ids = given.get("input_ids")
        if ids is not None:
            return int(ids.shape[1])
        return 0 if given.get("inputs_embeds") is not None else 1
    ids = given.get("decoder_input_ids")
    if ids is None:
        return 1
    has_start = torch.equal(sequences[:: len(sequences) // len(ids), : ids.shape[1]].to(ids), ids)
    return int(ids.shape[1]) + (not has_start)  # generate puts the start in front if it is missing


def has_decoder_inputs(module: Any) -> bool:
    """Whether what is generated is read by a decoder of its own, behind an encoder."""
    text = getattr(module.config, "get_text_config", lambda: module.config)()
    is_double = module.config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False)
    return bool(is_double) and accepts(module, "decoder_input_ids")


# -- what was given -------------------------------------------------------------------------------


def _by_one_name(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """`given` without what is None, and with `inputs` under the name that the forward has."""
    given = {name: value for name, value in given.items() if value is not None}
    inputs = given.pop("inputs", None)
    if inputs is not None:
        given[module.main_input_name] = inputs
    return given


def _with_mask_of_encoder(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with the mask that generate makes for an encoder if none is given."""
    ids = given.get("input_ids")
    if ids is None or "attention_mask" in given or not has_decoder_inputs(module):
        return given
    mask = _inferred_mask(module, given, ids) if infers_the_mask_of_an_encoder() else None
    return given if mask is None else {**given, "attention_mask": mask}


def _refuse_part_of_a_prompt(given: dict[str, Any]) -> None:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or mask is None or given.get("past_key_values") is None:
        return
    if mask.shape[-1] > ids.shape[1]:
        raise UnsupportedError(
            f"{mask.shape[-1] - ids.shape[1]} tokens of the prompt are in past_key_values alone, "
            f"and one pass over all tokens needs them: give the whole prompt."
        )


def _refuse_new_placeholders(module: Any, given: dict[str, Any], sequences: Tensor) -> None:
    """A pass puts images where their placeholders are; a step takes a new one for a word."""
    new = sequences[:, prompt_length(module, given, sequences) :]
    for name, source in _PLACEHOLDERS.items():
        placeholder = getattr(module.config, name, None)
        if placeholder is not None and source in given and bool((new == placeholder).any()):
            raise UnsupportedError(
                f"the model has generated token {placeholder} ({name}), for which one pass over "
                f"all tokens would look into {source}: generate with "
                f"suppress_tokens=[{placeholder}]."
            )


def _is_of_the_pass(module: Any, name: str, value: Any) -> bool:
    if name in _NOT_OF_THE_PASS:
        return False
    if accepts(module, name):
        return True
    is_tensor = next(tensors(value), None) is not None
    return is_tensor and takes_more(module) and name not in generates_with(module)


def _rows(module: Any, given: dict[str, Any]) -> int:
    """How many rows the inputs have."""
    names = ("input_ids", "inputs_embeds", module.main_input_name, "encoder_outputs", *given)
    found = (next(tensors(given.get(name)), None) for name in names)
    first = next((tensor for tensor in found if tensor is not None and tensor.dim()), None)
    return 1 if first is None else len(first)


def _repeated(
    module: Any, inputs: dict[str, Any], given: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """The inputs of each row as often as it has sequences, one behind the other."""
    if repeats == 1:
        return inputs
    rows = _rows(module, given)
    images = repeat_images(module, given, rows, repeats) if rows > 1 else {}

    def repeated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if rows == 1:
            return leaf.repeat(repeats, *[1] * (leaf.dim() - 1))
        return leaf.repeat_interleave(repeats, 0) if len(leaf) == rows else leaf

    def value_of(name: str, value: Any) -> Any:
        if name == "position_ids" and value.dim() == 3:
            return value.repeat_interleave(repeats, 1)  # (axes, rows, positions)
        return images[name] if name in images else map_leaves(repeated, value)

    return {name: value_of(name, value) for name, value in inputs.items()}


# -- what is padding ------------------------------------------------------------------------------


def _mask_of_prompt(module: Any, given: dict[str, Any], sequences: Tensor) -> Tensor:
    """The mask of what was there before the first new token, one row for each that was given."""
    of_decoder = has_decoder_inputs(module)
    mask = given.get("decoder_attention_mask" if of_decoder else "attention_mask")
    length = prompt_length(module, given, sequences)
    if of_decoder:
        rows = _rows(module, given) if mask is None else len(mask)
    else:
        embeds = given.get("inputs_embeds")
        length = length if embeds is None else int(embeds.shape[1])
        rows = _rows(module, given)
        if mask is None and given.get("input_ids") is not None:
            mask = _inferred_mask(module, given, given["input_ids"])
    if mask is None:
        return torch.ones(rows, length, dtype=torch.long, device=sequences.device)
    missing = length - mask.shape[1]  # a start token that generate puts in front
    return torch.cat([mask.new_ones(len(mask), missing), mask], 1) if missing > 0 else mask


def _inferred_mask(module: Any, given: dict[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that generate makes of ids alone: none, unless padding is plain in them."""
    pad = generation_settings(module, given).pad_token_id
    if pad is None or pad in end_tokens(module, given) or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()


def end_tokens(module: Any, given: dict[str, Any]) -> list[int]:
    """The end-of-sequence tokens."""
    ends = generation_settings(module, given).eos_token_id
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def generation_settings(module: Any, given: dict[str, Any]) -> Any:
    """The configuration that a generation goes by."""
    settings = {name: value for name, value in given.items() if not accepts(module, name)}
    return generation_config_of(part_that_generates(module), settings)


def up_to_end(new: Tensor, ends: list[int]) -> Tensor:
    """How many of the new tokens are up to the first of `ends`, with it, in each row."""
    is_end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    before = is_end.long().cumsum(1) - is_end.long() == 0
    return before.sum(1)


# -- all tokens -----------------------------------------------------------------------------------


def _with_tokens(
    module: Any,
    inputs: dict[str, Any],
    given: dict[str, Any],
    sequences: Tensor,
    mask: Tensor,
) -> dict[str, Any]:
    """`inputs`, over the prompt and what is new."""
    start = prompt_length(module, given, sequences)
    ids = sequences.clamp(min=0)  # beams may be filled up with -1
    if has_decoder_inputs(module):
        inputs.pop("decoder_inputs_embeds", None)
        inputs["decoder_input_ids"] = ids
        if accepts(module, "decoder_attention_mask"):
            inputs["decoder_attention_mask"] = mask.long()
        return inputs
    new = ids[:, start:]
    if "inputs_embeds" in inputs:
        inputs.pop("input_ids", None)
        inputs["inputs_embeds"] = _with_embeddings(module, inputs["inputs_embeds"], new)
    else:
        inputs["input_ids"] = ids
    for name in _TYPES:
        if name in inputs:
            inputs[name] = _with_types(module, name, inputs[name], new.shape[1])
    if accepts(module, "attention_mask"):
        inputs["attention_mask"] = mask.long()
    if "position_ids" in inputs:
        inputs["position_ids"] = _with_next_positions(inputs["position_ids"], new.shape[1])
        return inputs
    return with_positions(inputs, module)


def _with_embeddings(module: Any, embeds: Tensor, new: Tensor) -> Tensor:
    return torch.cat([embeds, module.get_input_embeddings()(new).to(embeds)], 1)


def _with_types(module: Any, name: str, types: Tensor, count: int) -> Tensor:
    kind = type_of_new_tokens(module, name)
    last = types[:, -1:] if kind is None else torch.full_like(types[:, -1:], kind)
    return torch.cat([types, last.expand(-1, count)], 1)


def _with_next_positions(positions: Tensor, count: int) -> Tensor:
    """Positions that were given, one further for each new token."""
    following = torch.arange(1, count + 1, device=positions.device)
    return torch.cat([positions, positions[..., -1:] + following], -1)


def _without_last(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    names = (*_OF_TOKENS, *_TYPES) if "decoder_input_ids" not in inputs else _OF_DECODER
    cut: dict[str, Callable[[Tensor], Tensor]] = {"inputs_embeds": lambda value: value[:, :-1]}
    return {
        name: cut.get(name, lambda value: value[..., :-1])(value) if name in names else value
        for name, value in inputs.items()
    }
