"""Notice arguments of a trace that the model's forward would swallow without a word."""

# Most forwards of transformers take `**kwargs`, hand them on and on, and ignore what nobody knows.

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from torch import nn

from tracekit.capture import warn_user
from tracekit.errors import InputError
from tracekit.models.generate_options import OF_RESULT
from tracekit.models.signatures import accepts, arguments

_OF_GENERATE: Final = frozenset(
    {
        "do_sample",
        "freq_penalty",
        "generation_config",
        "logits_processor",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "num_beams",
        "num_return_sequences",
        "output_logits",
        "progress",
        "repetition_penalty",
        "stop_at_eos",
        "stop_strings",
        "stopping_criteria",
        "streamer",
        "temperature",
        "top_k",
        "top_p",
        "use_past_kv_cache",
        "verbose",
    }
)
# Of other calls of a model; a forward would go on as if they had not been said.
_OF_CACHES: Final = "it is an option of model.run_with_cache(input, ...)"
_OF_HOOKS: Final = "it is an option of model.run_with_hooks(input, ...), and of model.hooks(...)"
_OF_OTHERS: Final = {
    "remove_batch_dim": _OF_CACHES,
    "pos_slice": _OF_CACHES,
    "incl_bwd": _OF_CACHES,
    "stop_at_layer": f"{_OF_CACHES}, and of run_with_hooks",
    "fwd_hooks": _OF_HOOKS,
    "bwd_hooks": _OF_HOOKS,
    "loss_per_token": "it is an option of model.forward(input, return_type='loss')",
}
# What forwards take by `**kwargs` (transformers 4.57 to 5.23).
_OF_FORWARDS: Final = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def check_options(module: nn.Module, names: Iterable[str]) -> None:
    """InputError for what belongs to `generate`; a warning for what is one letter from another."""
    for name in names:
        if accepts(module, name) or name in _OF_FORWARDS:
            continue
        if name in _OF_OTHERS:
            raise InputError(f"{name}= would be ignored here: {_OF_OTHERS[name]}.")
        if name in _OF_GENERATE or name in OF_RESULT:
            cure = OF_RESULT.get(name, f"write `with model.generate(input, {name}=...) as tracer:`")
            raise InputError(
                f"{name}= is an option of generate(), and a trace is one forward pass: {cure}."
            )
        known = [*arguments(module), *_OF_FORWARDS]
        near = get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            kind = type(module).__name__
            warn_user(f"{kind} knows no {name}=, and ignores it; did you mean {near[0]}=?")
