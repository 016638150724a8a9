"""Find out on a few tokens whether a model goes on rightly from keys and values that are there."""

# Not all do: in transformers 4.57 T5Gemma computes something else behind a filled cache. No list of
# such models would be complete, so each is asked, once.

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tracekit.core.nest import first_tensor
from tracekit.core.tree import Tree
from tracekit.errors import UnsupportedError
from tracekit.models.behind import behind, run_behind
from tracekit.models.prefix import Prefix
from tracekit.models.signatures import accepts
from tracekit.tracing.rehearsal import as_if_nothing_ran, real_twin

TOKENS: Final = 6  # half of them before, and more than one behind
LOWEST_ID: Final = 10  # most special tokens lie below, or at the end of the vocabulary
# How far off the outputs may be, beside how much they differ among themselves: T5Gemma is off by
# 0.4, and rounding by 1e-6.
TOLERANCE: Final = 0.01
TOLERANCE_OF_HALF: Final = 0.25  # 8 bits of mantissa, and experts that are chosen by them


def check_continues(model: Any, tree: Tree, prefix: Prefix, inputs: dict[str, Any]) -> None:
    """UnsupportedError if `model` is wrong behind a prefix like this, which it made of `inputs`.

    Runs a twin of it on six tokens, in three passes, the first time that it is asked.
    """
    if tree.continues is None:
        try:
            off = _deviation(model, tree, prefix, inputs)
        except Exception:  # noqa: BLE001 - where it can't run so, runs behind a prefix say why
            return
        tree.continues = off <= tolerance(next(model.module.parameters()))
    if not tree.continues:
        raise UnsupportedError(
            f"{model.module.config.model_type} computes something else behind keys and values, or "
            f"states, that are there than without them, in this version of transformers. Trace the "
            f"whole text instead."
        )


def _deviation(model: Any, tree: Tree, prefix: Prefix, inputs: dict[str, Any]) -> float:
    """How far the outputs behind three tokens are off, beside how much they differ."""
    name = "decoder_input_ids" if prefix.source is not None else "input_ids"
    given: dict[str, Any] = {}
    if prefix.source is not None:  # the encoder reads what it read
        others = {name, "decoder_attention_mask", "position_ids", "past_key_values"}
        given = {key: value for key, value in inputs.items() if key not in others}
    ids = torch.arange(LOWEST_ID, LOWEST_ID + TOKENS, device=prefix.tokens.device)
    ids = ids.expand(prefix.rows if given else 1, -1)
    half = TOKENS // 2
    twin = real_twin(tree)
    with as_if_nothing_ran(tree):
        whole = _outputs(twin, {**given, name: ids, "use_cache": False})
        first = {**given, name: ids[:, :half], "use_cache": True}
        kv_cache = _kv_cache(_run(twin, first))
        mask = torch.ones_like(ids[:, :half])
        begun = Prefix(model, kv_cache, ids[:, :half], mask, source=prefix.source)
        rest = behind(model, begun, {name: ids[:, half:]}, for_generate=False)
        found = _outputs(twin, rest)
    return deviation(found, whole[:, half:])


def deviation(found: Tensor, expected: Tensor) -> float:
    """How far outputs are off, beside how much they differ among themselves."""
    plain = expected.float()
    return float((found.float() - plain).norm() / (plain - plain.mean(-1, keepdim=True)).norm())


def tolerance(like: Tensor) -> float:
    """How far they may be off in this precision."""
    return TOLERANCE_OF_HALF if like.dtype.itemsize < 4 else TOLERANCE


def _run(twin: Tree, inputs: dict[str, Any]) -> Any:
    if not accepts(twin.root, "use_cache"):
        inputs = {key: value for key, value in inputs.items() if key != "use_cache"}
    return run_behind(twin, None, (), inputs)


def _outputs(twin: Tree, inputs: dict[str, Any]) -> Tensor:
    outputs = _run(twin, {key: value for key, value in inputs.items() if key != "logits_to_keep"})
    found = getattr(outputs, "logits", None)
    found = first_tensor(outputs) if found is None else found
    assert isinstance(found, Tensor)
    return found


def _kv_cache(outputs: Any) -> Any:
    found = getattr(outputs, "past_key_values", None)
    return outputs.cache_params if found is None else found
