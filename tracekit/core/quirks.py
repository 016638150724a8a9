"""Oddities of upstream, each a named fact with the versions it holds for."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn

# The backward pass that runs on this thread, or NO_BACKWARD. Hooks inside a block under gradient
# checkpointing fire a second time in backward, when autograd computes it again (torch 2.4 to 2.13).
current_backward = torch._C._current_graph_task_id  # pyright: ignore[reportPrivateUsage] - no public way to tell
NO_BACKWARD = -1
# Where a module keeps its hooks, each a dictionary by number (torch 2.6 to 2.13).
HOOK_DICTS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# The cap of its logits, in a configuration (Gemma 2 and 3, RecurrentGemma, xLSTM; 4.57 to 5).
LOGIT_CAPS: Final = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children as `module` itself holds them: by name, shared ones as often as they are named.

    `named_children` leaves out repeated ones, and then indices of a list would be off.
    """
    return module._modules  # pyright: ignore[reportPrivateUsage] - no public way to get repeated ones


def first_weight(module: nn.Module) -> Tensor | None:
    """The first of its parameters; as fast as every trace needs it."""
    for weight in module._parameters.values():  # pyright: ignore[reportPrivateUsage] - parameters() is 10 times slower
        if weight is not None:
            return weight
    for child in own_children(module).values():
        found = first_weight(child) if child is not None else None
        if found is not None:
            return found
    return None


def at_rest(hook: Any) -> Any:
    """A copy of an accelerate hook that brings no weights (AlignDevicesHook, SequentialHook; 1.1 to
    1.15); what it does besides, such as moving inputs between devices, it still does."""
    found = copy.copy(hook)
    if hasattr(found, "hooks"):
        found.hooks = tuple(at_rest(each) for each in found.hooks)
    elif getattr(found, "offload", False):
        found.offload, found.weights_map = False, None
    return found


def is_checkpointing(module: nn.Module) -> bool:
    """Whether backward computes this layer again (transformers 4.53 to 5: a class of layers)."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    is_on = module.training and getattr(module, "gradient_checkpointing", False)
    return bool(is_on) and "GradientCheckpointingLayer" in kinds


def generation_config_of(module: Any, given: dict[str, Any]) -> Any:
    """The configuration that `module.generate(**given)` goes by: what is given, over the module's
    own, over the defaults (transformers 4.57 to 5, whose rules of precedence differ)."""
    others = set(inspect.signature(type(module).generate).parameters) - {"use_model_defaults"}
    settings = {name: value for name, value in given.items() if name not in others}
    return module._prepare_generation_config(given.get("generation_config"), **settings)[0]


def is_config(value: object) -> bool:
    """Whether this is a configuration of transformers, whose attributes are computed by name."""
    names = ("PretrainedConfig", "PreTrainedConfig")  # transformers 4, 5
    return any(kind.__name__ in names for kind in type(value).__mro__)


def is_before_5() -> bool:
    """Whether transformers 4 is installed."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5


def infers_the_mask_of_an_encoder() -> bool:
    """Whether `generate` makes a mask of the padding in ids, if none is given, for encoders too
    (transformers 4.57; in 5 for decoders alone)."""
    return is_before_5()


def hides_the_chunks_of_a_prompt() -> bool:
    """Whether `generate(prefill_chunk_size=...)` runs a prompt by the model's `forward`, past the
    hooks of the model itself (transformers 4.57; in 5 it calls the model)."""
    return is_before_5()


def asks_criteria_about_drafts() -> bool:
    """Whether assisted decoding asks the stopping criteria twice in each iteration: first about the
    draft, before the model has run (transformers 4.57)."""
    return is_before_5()


def type_of_new_tokens(module: Any, name: str) -> int | None:
    """Which type generated tokens have, in `token_type_ids` and the like; None: that of the last.

    PaliGemma (4.57 to 5) reads types as 0 for the prefix, in which all see all, and 1 for what is
    generated. What marks images is 0 for text.
    """
    if name == "mm_token_type_ids":
        return 0
    return {"paligemma": 1, "gemma3": 0}.get(module.config.model_type)


def part_that_generates(module: Any) -> Any:
    """The module whose `generate` makes the tokens: BLIP-2 and its heirs (4.57 to 5) hand theirs
    over to the language model in them."""
    inner = getattr(module, "language_model", None)
    is_handed_over = "generate" in vars(type(module)) and callable(getattr(inner, "generate", None))
    return inner if is_handed_over else module


def takes_off_the_start(module: Any) -> bool:
    """Whether `generate` hands back an encoder-decoder's tokens without those that its decoder
    began with (Whisper, 4.57 to 5; those of all others have them)."""
    return module.config.model_type == "whisper"
