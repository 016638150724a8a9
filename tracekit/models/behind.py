"""What a run is told that begins behind a prefix: the mask, the positions, and a fork of it."""

# The inputs of such a run hold the prefix itself, under "prefix", until the model is called: then
# it is forked, for the rows that there are. So inputs can be joined, and runs rehearsed.

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.core.quirks import generation_config_of, is_before_5
from tracekit.core.tree import Tree
from tracekit.errors import InputError, UnsupportedError
from tracekit.models import generation
from tracekit.models.kv_cache import KeyValueCache
from tracekit.models.kv_layers import end_run, layers_of, settle
from tracekit.models.padding import positions_of
from tracekit.models.prefix import Prefix
from tracekit.models.rests import (
    check_gap,
    check_rest,
    check_rows,
    first_of,
    joined_mask,
    of_decoder,
)
from tracekit.models.scanning import run_dry
from tracekit.models.signatures import accepts, owner_of_generate
from tracekit.tracing.call import Follower

MOST_NEW: Final = 1024  # positions that a generation gets room for at once; it may end much earlier


@final
class Behind:
    """A prefix among the inputs of a run, and the KeyValueCache that grows by the run."""

    def __init__(self, prefix: Prefix, grown: KeyValueCache | None = None) -> None:
        self.prefix = prefix
        self.grown = grown

    def __deepcopy__(self, memo: object) -> Behind:
        return self


def behind(model: Any, given: object, rest: dict[str, Any], for_generate: bool) -> dict[str, Any]:
    """The inputs of a run of `model` on `rest`, behind the prefix `given`.

    Raises InputError where the two do not fit, PaddingError where padding between them would be
    counted, UnsupportedError for what the model can't do.
    """
    found = _prefix_of(model, given)
    prefix, module = found.prefix, model.module
    rest = of_decoder(dict(rest), prefix)
    check_rest(rest)
    name = "decoder_" if prefix.source is not None else ""
    shown = first_of(rest, f"{name}input_ids", f"{name}inputs_embeds")
    if shown is None or not shown.shape[1]:
        raise InputError(
            "the rest behind a prefix is empty: at least one token must be new, as the prefix "
            "holds no outputs. Leave the last token out of the prefix, and give it as the rest."
        )
    rows = shown.shape[0]
    check_rows(rows, prefix)
    own = rest.get(f"{name}attention_mask")
    own = torch.ones(shown.shape[:2], dtype=torch.long, device=shown.device) if own is None else own
    mask = joined_mask(prefix, own, shown)
    check_gap(module, prefix, mask, for_generate)
    if for_generate:
        return _of_generation(module, found, rest, mask, name)
    rest.pop(f"{name}attention_mask", None)
    if not prefix.is_stateful or not bool(mask.all()):
        rest[f"{name}attention_mask"] = mask
    return {**rest, **_sources(prefix, rows), "use_cache": True, "prefix": found}


def goes_on(given: object) -> bool:
    """Whether text behind `given` is a rest; behind an empty KeyValueCache it is a beginning."""
    if isinstance(given, KeyValueCache):
        return given.previous_attention_mask.shape[1] > 0
    return given is not None


def run_behind(
    tree: Tree, follower: Follower | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One forward pass, behind a prefix if there is one among its inputs."""
    with _begun(tree, kwargs) as inputs:
        return generation.forward(tree, follower, args, inputs)


def run_dry_behind(tree: Tree, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same, of a twin on fake tensors."""
    with _begun(tree, kwargs) as inputs:
        return run_dry(tree, _, args, inputs)


def generate_behind(
    tree: Tree, follower: Follower | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `generate` returns, behind a prefix if there is one among its inputs."""
    if follower is not None and isinstance(kwargs.get("prefix"), Behind):
        follower.timeline.is_behind_prefix = True
    with _begun(tree, kwargs, for_generate=True) as inputs:
        return generation.generate(tree, follower, args, inputs)


# -- what fits ------------------------------------------------------------------------------------


def _prefix_of(model: Any, given: object) -> Behind:
    if isinstance(given, KeyValueCache):
        return _of_entries(model, given)
    if not isinstance(given, Prefix):
        raise InputError(
            f"prefix= takes what model.prefill(prompt) returns, or a KeyValueCache, not "
            f"{type(given).__name__}."
        )
    given.check_belongs(model)
    given.check_unchanged()
    return Behind(given)


def _of_entries(model: Any, given: KeyValueCache) -> Behind:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    given.check()
    layers = model.module.config.get_text_config(decoder=True).num_hidden_layers
    if len(given) != layers:
        raise InputError(
            f"this KeyValueCache has {len(given)} entries, and the model {layers} layers: it needs "
            f"one for each, as KeyValueCache.init(model) makes them."
        )
    if given.model is not None and given.model.module is not model.module:
        raise InputError(
            "this KeyValueCache is of another model: keys and values are of the weights that made "
            "them."
        )
    kv_cache: Any = DynamicCache()
    for entry in given:
        layer: Any = DynamicLayer()
        keys, values = entry.past_keys, entry.past_values
        layer.keys, layer.values = keys.transpose(1, 2), values.transpose(1, 2)
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        kv_cache.layers.append(layer)
    mask = given.previous_attention_mask
    tokens = torch.full(mask.shape, -1) if given.tokens is None else given.tokens
    return Behind(Prefix(model, kv_cache, tokens, mask), grown=given)


# -- what is told ---------------------------------------------------------------------------------


def _of_generation(
    module: Any, found: Behind, rest: dict[str, Any], mask: Tensor, name: str
) -> dict[str, Any]:
    """The inputs of `generate`, which takes all tokens and runs those that are not in its cache."""
    prefix = found.prefix
    _check_generates(module, found, rest, name)
    ids = rest[f"{name}input_ids"]
    rows = ids.shape[0]
    before = prefix.tokens.to(ids.device).expand(rows, -1)
    rest[f"{name}input_ids"] = torch.cat([before, ids], 1)
    rest[f"{name}attention_mask"] = mask
    rest.pop("mm_token_type_ids", None)
    return {**rest, **_sources(prefix, rows), "prefix": found}


def _check_generates(module: Any, found: Behind, rest: dict[str, Any], name: str) -> None:
    kind = type(module).__name__
    owner = owner_of_generate(module)
    if owner != "GenerationMixin":
        raise UnsupportedError(
            f"{kind} generates in a way of its own ({owner}.generate), which takes no prefix. "
            f"Trace behind the prefix, or generate from the whole text."
        )
    if not accepts(module, "past_key_values"):
        raise UnsupportedError(
            f"generate() of {kind} does not go on from states that are there (transformers 5.23 "
            f"runs all tokens again). Trace behind the prefix, or generate from the whole text."
        )
    if rest.get("prefill_chunk_size") is not None and is_before_5():
        raise UnsupportedError(
            "transformers 4 runs the prefix again in chunks: leave prefill_chunk_size= out."
        )
    if found.grown is not None and not found.grown.frozen and _copies(module, rest) > 1:
        raise InputError(
            "a KeyValueCache grows by its own rows, and beams and several sequences of a row are "
            "more: freeze() it, or generate with num_beams=1 and num_return_sequences=1."
        )
    if rest.get(f"{name}input_ids") is None:
        raise InputError("generate() behind a prefix takes token ids or text, not inputs_embeds.")
    if name and not bool((found.prefix.tokens[:, 0] == start_of(module)).all()):
        raise InputError(
            f"generate() puts {kind}'s first token ({start_of(module)}) before decoder ids that "
            f"begin otherwise, and this prefix begins otherwise: put it first in "
            f"model.prefill(source, decoder_input_ids=...)."
        )
    if bool((found.prefix.tokens < 0).any()):
        raise InputError(
            "generate() returns all tokens, and this KeyValueCache does not know its own: make it "
            "with tokens=ids, or from a prefix."
        )


def _sources(prefix: Prefix, rows: int) -> dict[str, Any]:
    if prefix.source is None:
        return {}
    from transformers.modeling_outputs import BaseModelOutput

    hidden: Any = prefix.source.hidden.expand(rows, -1, -1)
    found: dict[str, Any] = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
    if prefix.source.attention_mask is not None:
        found["attention_mask"] = prefix.source.attention_mask.expand(rows, -1)
    return found


# -- while it runs --------------------------------------------------------------------------------


@contextmanager
def _begun(
    tree: Tree, kwargs: dict[str, Any], for_generate: bool = False
) -> Generator[dict[str, Any]]:
    """The arguments with a fork of the prefix in its place, and its buffers while the run lasts."""
    found = kwargs.get("prefix")
    if not isinstance(found, Behind):
        yield kwargs
        return
    prefix, module = found.prefix, tree.root
    inputs = {name: value for name, value in kwargs.items() if name != "prefix"}
    ids = first_of(inputs, "decoder_input_ids", "decoder_inputs_embeds", "input_ids")
    ids = first_of(inputs, "inputs_embeds") if ids is None else ids
    assert ids is not None
    rows = ids.shape[0] * (_copies(module, inputs) if for_generate else 1)
    _add_places(module, prefix, inputs, ids, for_generate)
    positions = _new_positions(module, prefix, inputs, ids) if for_generate else ids.shape[1]
    name = "past_key_values" if accepts(module, "past_key_values") else "cache_params"
    work = None
    if tree.original is not None:  # a dry run or a rehearsal, perhaps of other rows
        inputs[name] = prefix.fork(rows) if rows % prefix.rows == 0 else prefix.row(rows)
    else:
        has_grad = torch.is_grad_enabled() and not for_generate  # which computes without
        lends = found.grown is None and not has_grad and positions > 0
        work = prefix.pool.lend(rows, positions, ids.device) if lends else None
        inputs[name] = prefix.fork(rows, work)
    try:
        yield inputs
        if found.grown is not None and not found.grown.frozen and tree.original is None:
            _grow(found.grown, inputs, name, rows)
    finally:
        if work is not None:
            end_run(inputs[name])
            prefix.pool.take_back(work, prefix.rows)


def _grow(grown: KeyValueCache, inputs: dict[str, Any], name: str, rows: int) -> None:
    """The run is over: the cache holds what the run appended."""
    kv_cache = inputs[name]
    settle(kv_cache)
    for entry, layer in zip(grown, layers_of(kv_cache), strict=True):
        entry.past_keys = layer.keys.detach().transpose(1, 2)
        entry.past_values = layer.values.detach().transpose(1, 2)
    length = len(grown[0])
    mask = inputs["attention_mask"][:, :length]
    added = length - mask.shape[1]  # the tokens that a generation fed back
    before = grown.tokens
    grown.previous_attention_mask = torch.cat([mask, mask.new_ones(rows, added)], 1)
    ids = inputs.get("input_ids")
    grown.tokens = None
    if before is not None and ids is not None and not added:
        is_whole = ids.shape[1] == length
        grown.tokens = ids if is_whole else torch.cat([before.expand(rows, -1), ids], 1)


def _copies(module: Any, inputs: dict[str, Any]) -> int:
    """How many sequences `generate` makes of a row, each of which needs its own cache."""
    config = generation_config_of(module, inputs)
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def _new_positions(module: Any, prefix: Prefix, inputs: dict[str, Any], ids: Tensor) -> int:
    """For how many positions a generation gets room."""
    config = generation_config_of(module, inputs)
    new = config.max_new_tokens
    new = int(config.max_length or 0) - ids.shape[1] if new is None else int(new)
    return ids.shape[1] - len(prefix) + min(max(new, 0), MOST_NEW)


def _add_places(
    module: Any, prefix: Prefix, inputs: dict[str, Any], ids: Tensor, for_generate: bool
) -> None:
    """Add `position_ids` that go on from the prefix, where the model takes them."""
    if not accepts(module, "position_ids") or "position_ids" in inputs:
        return
    if prefix.source is not None:
        return  # decoders behind an encoder count from their own cache
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(ids.shape[0], len(prefix) + ids.shape[1], device=ids.device).long()
    length = mask.shape[1] - len(prefix)
    places = prefix.positions_with(mask)
    if places is None:
        if not for_generate:  # which counts as we do
            inputs["position_ids"] = positions_of(module, mask)[:, -length:]
    elif not for_generate:
        inputs["position_ids"] = places[..., -length:]
    else:  # generate has the plain columns as a first axis
        columns = (mask.long().cumsum(-1) - 1).clamp(min=0)
        inputs["position_ids"] = torch.cat([columns[None], places])


def start_of(module: Any) -> int | None:
    """The token with which a decoder behind an encoder starts."""
    start = module.generation_config.decoder_start_token_id
    if start is None:
        start = getattr(module.config, "decoder_start_token_id", None)
    return module.generation_config.bos_token_id if start is None else start


def names_of(inputs: Iterable[str]) -> set[str]:
    """The names of inputs that the model itself is to know."""
    return {*inputs} - {"prefix"}
