"""Options of `generate` beside Hugging Face's own, in its terms.

Their names and meaning are those of TransformerLens.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from tracekit.core.quirks import takes_off_the_start
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.recompute import has_decoder_inputs
from tracekit.models.signatures import arguments, generates_with, is_transformers, parameters

OPTIONS: Final = frozenset(
    {
        "append_eos",
        "freq_penalty",
        "padding_side",
        "prepend_bos",
        "progress",
        "stop_at_eos",
        "use_past_kv_cache",
        "verbose",
    }
)
# What only says how the result is handed back, and what a tracer has in its place.
OF_RESULT: Final = {
    "return_type": "read tracer.result, and decode it with model.tokenizer; for the loss of one "
    "pass, model.forward(input, return_type='loss'), in `with model.hooks(...)` if you like",
    "return_cache": "write `cache = tracer.cache()` in the block",
    "names_filter": "write `cache = tracer.cache(modules)` in the block",
    "device": "write `cache = tracer.cache(device=...)` in the block",
    "return_input_tokens": "read `model.inputs` in the block",
}
# Taken by transformers' generate, and named nowhere.
_UNNAMED: Final = frozenset({"assistant_tokenizer", "tokenizer"})


def refuse_in_header(options: Iterable[str]) -> None:
    """InputError for an option that shapes what is handed back, where a tracer is."""
    for name in options:
        if name in OF_RESULT:
            raise InputError(
                f"{name}= says what generate() returns, and as the header of a `with` it is a "
                f"tracer: {OF_RESULT[name]}."
            )


def translated(module: Any, given: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """The arguments of the module's own `generate` for those of LanguageModel's.

    Raises InputError for options that contradict each other, and for names that are unknown and
    near to one that is known; all others are transformers' to refuse.
    """
    if not is_transformers(module):
        return given
    given = dict(given)
    _check_names(module, given)
    _rename(given, "use_past_kv_cache", "use_cache")
    _rename(given, "verbose", "progress")
    _stop_or_not(module, given)
    _penalize(module, given)
    if given.get("output_logits"):
        given.setdefault("return_dict_in_generate", True)
    if given.get("temperature") == 0:
        del given["temperature"]
        given["do_sample"] = False
    if _has_stop_strings(given) and tokenizer is not None:
        given.setdefault("tokenizer", tokenizer)
    return given


def _check_names(module: Any, given: dict[str, Any]) -> None:
    own = parameters(type(module).generate) | arguments(module) | generates_with(module)
    known = own | OPTIONS | OF_RESULT.keys() | _UNNAMED
    for name in given:
        near = get_close_matches(name, known, n=1, cutoff=0.8) if name not in known else []
        if near:
            raise InputError(
                f"generate() of {type(module).__name__} knows no {name}=; did you mean {near[0]}=?"
            )


def _rename(given: dict[str, Any], name: str, own: str) -> None:
    """Give an option under the name that it has in transformers."""
    value = given.pop(name, None)
    if value is None:
        return
    if given.get(own) not in (None, value):
        raise InputError(
            f"{name}={value!r} and {own}={given[own]!r} are two names of one option: give one."
        )
    given[own] = value


def _stop_or_not(module: Any, given: dict[str, Any]) -> None:
    if given.pop("stop_at_eos", True):
        return
    if given.get("eos_token_id") is not None:
        raise InputError(
            f"stop_at_eos=False never stops at a token, and eos_token_id={given['eos_token_id']!r} "
            f"says at which: give one of them."
        )
    if takes_off_the_start(module):  # it hands a configuration on, which is filled up again
        raise UnsupportedError(
            f"{type(module).__name__} takes its end from its own generation_config whatever it is "
            f"told, so stop_at_eos=False is lost: give min_new_tokens=."
        )
    # A configuration without an end is filled up from the model's own; only a keyword wins over
    # that, and transformers wants keywords or a configuration, not both (4.57 to 5).
    given.update({**_as_keywords(given.pop("generation_config", None)), **given})
    given["eos_token_id"] = None


def without_ends(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a generation that ends at no token, but only when it is as long as asked."""
    kept = {name: value for name, value in given.items() if name not in _ENDS}
    if takes_off_the_start(module):  # it hands a configuration on, which is filled up again
        return kept
    return {**_as_keywords(kept.pop("generation_config", None)), **kept, "eos_token_id": None}


_ENDS: Final = frozenset({"stopping_criteria", "stop_strings", "max_time", "stop_at_eos"})


def _as_keywords(config: Any) -> dict[str, Any]:
    """What a generation configuration sets."""
    if config is None:
        return {}
    defaults = vars(type(config)())
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name != "transformers_version"
        and (name not in defaults or value != defaults[name])
    }


def _penalize(module: Any, given: dict[str, Any]) -> None:
    penalty = given.pop("freq_penalty", None)
    if not penalty:
        return
    is_prompt = given.get("input_ids") is not None and not has_decoder_inputs(module)
    mask = given.get("attention_mask") if is_prompt else None
    own = given.get("logits_processor")
    given["logits_processor"] = _processors([*(own or []), _frequency_class()(penalty, mask)])


def _has_stop_strings(given: dict[str, Any]) -> bool:
    config = given.get("generation_config")
    return bool(given.get("stop_strings") or getattr(config, "stop_strings", None))


def _processors(processors: list[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


@cache
def _frequency_class() -> Any:
    """Made once, when transformers is first needed: importing it takes seconds."""
    from transformers import LogitsProcessor

    class FrequencyPenalty(LogitsProcessor):
        """Takes `penalty` off a token's logit for each time that it has come; padding is none."""

        def __init__(self, penalty: float, mask: Tensor | None) -> None:
            self._penalty = penalty
            self._mask = mask  # of the prompt

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            mask, penalty = self._mask, torch.tensor(-self._penalty).to(scores)
            weights = penalty.repeat(input_ids.shape)
            if mask is not None and mask.shape[1] <= input_ids.shape[1]:
                rows = mask.repeat_interleave(len(input_ids) // len(mask), 0)
                weights[:, : mask.shape[1]] *= rows.to(weights)
            return scores.scatter_add(1, input_ids, weights)

    return FrequencyPenalty
