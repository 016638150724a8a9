"""How many steps a generation will have, where that is certain before it begins."""

# Told from the arguments of `generate`: nothing of it runs. That the generation then had so many
# steps is checked when it ends (Interleaver.finish), as arguments do not tell all.

from __future__ import annotations

from typing import Any, Final

from tracekit.core.quirks import generation_config_of
from tracekit.errors import StepError
from tracekit.models.signatures import by_name, owner_of_generate

_ONE_TOKEN_A_STEP: Final = ("greedy_search", "sample", "beam_search", "beam_sample")


def count_steps(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many steps `module.generate(*args, **kwargs)` will have.

    StepError, with the reason, if it may end earlier, or takes steps of more than one token.
    """
    if owner_of_generate(module) != "GenerationMixin":
        raise _unknown(f"{type(module).__name__} generates in a way of its own")
    given = by_name(module, args, kwargs)
    if given.get("custom_generate") is not None:
        raise _unknown("custom_generate= may end when it likes")
    if given.get("stopping_criteria"):
        raise _unknown("stopping_criteria= may end it early", "leave them out")
    config = generation_config_of(module, given)
    if config.get_generation_mode(given.get("assistant_model")) not in _ONE_TOKEN_A_STEP:
        raise _unknown("in this mode of generation a step may bring several tokens")
    for name in ("max_time", "stop_strings"):
        if getattr(config, name, None) is not None:
            raise _unknown(f"{name} may end it early", f"give {name}=None")
    return _without_early_end(config, _most(config, given, module), _prompt(given, module))


def _most(config: Any, given: dict[str, Any], module: Any) -> int:
    """How many steps there are if no row ends early."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    length, prompt = given.get("max_length"), _prompt(given, module)
    if length is None or prompt is None:
        raise _unknown("it is not said how many tokens are new", "give max_new_tokens=")
    return int(length) - prompt


def _prompt(given: dict[str, Any], module: Any) -> int | None:
    """How many tokens there are before the first new one; None if that is not plain."""
    if module.config.is_encoder_decoder:
        return 1 if given.get("decoder_input_ids") is None else None
    ids = given.get("input_ids")
    ids = given.get("inputs") if ids is None else ids
    if ids is None or given.get("inputs_embeds") is not None or ids.dim() != 2:
        return None
    return int(ids.shape[1])


def _without_early_end(config: Any, most: int, prompt: int | None) -> int:
    """`most`, if no row can end before the last step."""
    least = config.min_new_tokens
    if least is None:
        least = 0 if prompt is None else (config.min_length or 0) - prompt
    if config.eos_token_id is not None and least < most - 1:
        raise _unknown(
            f"an end-of-sequence token ({config.eos_token_id}) may end it before {most} steps",
            f"give min_new_tokens={most}",
        )
    return most


def _unknown(why: str, cure: str = "") -> StepError:
    return StepError(
        f"steps can't be counted from the end of this generation: {why}; "
        f"{f'{cure}, or ' if cure else ''}loop over tracer.iter[:] and keep what came last."
    )
