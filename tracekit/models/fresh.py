"""A model made of a configuration alone: random weights by a seed, and nothing from the Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from tracekit.core.quirks import is_config
from tracekit.errors import LoadingError, did_you_mean
from tracekit.models.loading import auto_class, resolve

# What a family is given that is asked for by its name, of those that its configuration has.
SMALL: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "d_model": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "rotary_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "d_ff": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
MOST_OF_SMALL: Final = 20_000_000  # weights; the largest that was made small has 13,600,000
_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def fresh_model(
    config: Any, is_small: bool, seed: int | None, dtype: Any, device: Any, attention: str | None
) -> Any:
    """The model of `config`, in evaluation mode; the same for the same seed, on every device."""
    options = {"dtype": dtype, "attn_implementation": attention}
    given = {name: value for name, value in options.items() if value is not None}
    is_empty = device is not None and torch.device(device).type == "meta"
    if not is_empty or is_small:
        _check_size(_made(config, given, "meta"), is_small)
    with _seeded(seed):  # on the CPU, as each device draws other numbers
        model = _made(config, given, "meta" if is_empty else "cpu")
    return model.eval() if device is None or is_empty else model.eval().to(device)


def config_of(given: Any, overrides: dict[str, Any], tokenizer: Any) -> tuple[Any, bool]:
    """A configuration of its own, from one, a mapping, a directory, or the name of a family.

    And whether it is small: that of a family is, and for the tokens of `tokenizer`.
    """
    cls, known = _known(given)
    _check_names(cls, overrides)
    is_small = known is None
    try:
        known = _small(cls(), tokenizer, overrides) if known is None else known
        make = cls.from_dict if not is_small else lambda values: cls(**values)
        config = make({**known, **overrides})
    except Exception as error:  # each family has checks of its own
        raise LoadingError(f"{cls.__name__} does not take these values: {error}") from error
    _check_vocabulary(config, tokenizer)
    return config, is_small


def refuse_to_run() -> None:
    """LoadingError, where a model that was made without weights is to run."""
    raise LoadingError(
        "this model was made without weights (device='meta'), for its modules and shapes: scan it, "
        "read it by model.module, or leave device= out and have random ones."
    )


def _known(given: Any) -> tuple[Any, dict[str, Any] | None]:
    """The class of a configuration, and its values; None for those of the family."""
    import transformers

    if is_config(given):
        return type(given), given.to_dict()
    if isinstance(given, Mapping):
        values = {str(key): value for key, value in cast("Mapping[Any, Any]", given).items()}
        return _class_of(values.get("model_type"), "model_type"), values
    if not isinstance(given, (str, Path)):
        raise LoadingError(
            f"a configuration is one of transformers, a mapping with 'model_type', the name of a "
            f"family ('llama') or a directory with config.json, not {type(given).__name__}."
        )
    if Path(resolve(given)).is_dir():
        try:
            found = transformers.AutoConfig.from_pretrained(resolve(given), local_files_only=True)
        except (OSError, ValueError) as error:
            raise LoadingError(f"{str(given)!r} has no configuration: {error}") from error
        return type(found), found.to_dict()
    return _class_of(str(given), "config"), None


def _class_of(family: Any, name: str) -> Any:
    import transformers

    families = transformers.CONFIG_MAPPING
    if family not in families:
        near = did_you_mean(str(family), families.keys())
        raise LoadingError(
            f"{name}={family!r} is no family of transformers, and no directory{near or '.'}"
        )
    return families[family]


def _small(default: Any, tokenizer: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """What makes a configuration small, and at home with `tokenizer`."""
    sizes = {name: size for name, size in SMALL.items() if _is_set(default, name)}
    names = dict(default.attribute_map)
    said = {*overrides, *(names.get(name, name) for name in overrides)}
    if tokenizer is not None and "vocab_size" in sizes:
        sizes["vocab_size"] = len(tokenizer)
    length = overrides.get("vocab_size", sizes.get("vocab_size", 0))
    for name in _SPECIAL:
        own = _value(default, name)
        if tokenizer is not None and hasattr(default, name):
            sizes[name] = getattr(tokenizer, name)
        elif own is not None and (not isinstance(own, int) or own >= length):
            sizes[name] = 0 if name == "pad_token_id" else None  # some families must have one
    return {name: v for name, v in sizes.items() if names.get(name, name) not in said}


def _is_set(config: Any, name: str) -> bool:
    """Whether it has a value, which may be another."""
    own = getattr(type(config), name, None)
    is_fixed = isinstance(own, property) and own.fset is None
    return not is_fixed and _value(config, name) is not None


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):  # it differs by layer
        return None


def _check_names(cls: Any, overrides: dict[str, Any]) -> None:
    default: Any = cls() if overrides else None
    for name in overrides:
        if not hasattr(default, name) and name not in default.attribute_map:
            near = did_you_mean(name, [*vars(default), *default.attribute_map, *SMALL])
            raise LoadingError(f"{cls.__name__} has no {name}={near or '.'}")


def _check_vocabulary(config: Any, tokenizer: Any) -> None:
    length = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and isinstance(length, int) and length < len(tokenizer):
        raise LoadingError(
            f"the tokenizer has {len(tokenizer)} tokens, and the configuration {length}: give "
            f"vocab_size={len(tokenizer)}."
        )


def _made(config: Any, options: dict[str, Any], device: str) -> nn.Module:
    with torch.device(device):
        try:
            return auto_class(config).from_config(copy.deepcopy(config), **options)
        except LoadingError:
            raise
        except Exception as error:  # sizes that do not fit each other show where they meet
            raise LoadingError(
                f"{type(config).__name__} can't be built: {type(error).__name__}: {error}"
            ) from error


def _check_size(empty: nn.Module, is_small: bool) -> None:
    """LoadingError for a model that this machine has no room for, before it is tried.

    And for one that was to be small, and has parts that are not.
    """
    weights = list(empty.parameters())
    count = sum(weight.numel() for weight in weights)
    if is_small and count > MOST_OF_SMALL:
        raise LoadingError(
            f"{type(empty).__name__} can't be made small by its family's name alone: it would have "
            f"{count:,} weights, in parts that have sizes of their own. Give these (text_config="
            f"dict(hidden_size=…), …), or a configuration, which is taken as it is."
        )
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > room:
        raise LoadingError(
            f"{count:,} weights are {size / 2**30:.0f} GiB, and this machine has "
            f"{room / 2**30:.0f}: give smaller sizes (hidden_size=, num_hidden_layers=, …), or the "
            f"name of the family, which is made small; device='meta' makes it without weights."
        )


@contextmanager
def _seeded(seed: int | None) -> Generator[None]:
    """Numbers of torch by `seed`, on the CPU, and as before behind it; None: those of the user."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # no other device's, unlike manual_seed
        yield
