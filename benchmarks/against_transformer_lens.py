"""Numbers against TransformerLens: what both have of a model, by its hook names, and its weights.

    python benchmarks/against_transformer_lens.py [gpt2 llama …]

Each model of the tests' matrix (or those named) that TransformerLens takes is run by both, on the
same weights: `run_with_cache` by the names in common. Where it processes weights, its weights and
those of `model.processed()` are compared, too. The exit status is the number of models that differ.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from tests.tiny_models import NAMES, make  # noqa: E402
from tracekit import LanguageModel  # noqa: E402

CLOSE: Final = 1e-5  # float32
MASKED: Final = -1e30  # below it a score is a mask's: of -inf, or of the least of its dtype
WEIGHTS: Final = (
    "W_Q",
    "W_K",
    "W_V",
    "W_O",
    "b_Q",
    "b_K",
    "b_V",
    "b_O",
    "W_in",
    "W_out",
    "b_in",
    "b_out",
)
KNOWN: Final[dict[tuple[str, str], str]] = {}
WEIGHTS_OF_ALL: Final = ("W_E", "W_U", "b_U", "W_pos")


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    differ = 0
    print(f"{'model':16s} {'theirs':>7s} {'in common':>9s} {'largest difference':>19s}")
    for name in names:
        try:
            net, inputs, bridge = _bridged(name)
            with torch.no_grad():
                _, theirs = bridge.run_with_cache(**_for_bridge(inputs))
        except Exception as error:  # noqa: BLE001 - of whatever kind: it does not take this model
            print(f"{name:16s} TransformerLens: {str(error).splitlines()[0][:70]}")
            continue
        with torch.no_grad():
            _, ours = LanguageModel(net).run_with_cache(**inputs)
            differ += not _is_alike(name, ours, theirs)
    return differ


def _bridged(name: str) -> tuple[Any, dict[str, Any], Any]:
    from transformer_lens.model_bridge.sources import _bridge_builder as builder

    net, inputs = make(name, attn="eager")  # which it needs
    inner = copy.deepcopy(net)
    inner.config.architectures = [type(net).__name__]
    bridge = builder.build_bridge_from_module(
        inner, type(net).__name__, hf_config=inner.config, dtype=torch.float32, device="cpu"
    )
    return net, inputs, bridge


def _for_bridge(inputs: dict[str, Any]) -> dict[str, Any]:
    main = "input_ids" if "input_ids" in inputs else next(iter(inputs))
    return {"input": inputs[main], **{k: v for k, v in inputs.items() if k != main}}


def _is_alike(name: str, ours: Any, theirs: Any) -> bool:
    common = [key for key in theirs if key in ours]
    off = {key: _difference(key, ours[key], theirs[key]) for key in common}
    unknown = {key: each for key, each in off.items() if _reason(name, key) is None}
    worst = max(unknown.values())
    print(f"{name:16s} {len(list(theirs)):7d} {len(common):9d} {worst:19.1e}")
    wrong = [key for key in unknown if not off[key] <= CLOSE]
    for key in wrong[:12]:
        print(f"    {key}: {off[key]:.1e}, {tuple(ours[key].shape)}, {tuple(theirs[key].shape)}")
    known = {_reason(name, key) for key in common if off[key] > CLOSE} - {None}
    for reason in known:
        print(f"    known: {reason}")
    return not wrong


def _reason(name: str, key: str) -> str | None:
    return next(
        (why for (model, keys), why in KNOWN.items() if fnmatch(name, model) and fnmatch(key, keys)),
        None,
    )


def _difference(key: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference; without bound where the shapes differ."""
    if ours.shape[:1] == (1,) and "pos_embed" in key:
        theirs = theirs[:1]  # of one row: they repeat it
    if ours.dim() == theirs.dim() - 1 and ours.shape[0] == theirs.shape[0] * theirs.shape[1]:
        ours = ours.unflatten(0, theirs.shape[:2])  # rows and positions in one axis, in the model
    if ours.shape != theirs.shape:
        return float("inf")
    if key.endswith("hook_attn_scores"):
        ours = torch.where(ours < MASKED, theirs, ours)  # the patterns tell what is masked
    return (ours.float() - theirs.float()).abs().max().item()


def processed(name: str) -> Iterator[tuple[str, float]]:
    """Each weight that both have after processing, and the largest difference."""
    net, _, bridge = _bridged(name)
    bridge.enable_compatibility_mode(disable_warnings=True)
    model: Any = LanguageModel(net).processed()
    for weight in (*WEIGHTS, *WEIGHTS_OF_ALL):
        yield weight, _difference("", getattr(model, weight), getattr(bridge, weight))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or NAMES))
