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
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from tests.tiny_models import NAMES, make  # noqa: E402
from tracekit import LanguageModel  # noqa: E402

CLOSE: Final = 1e-5
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
WEIGHTS_OF_ALL: Final = ("W_E", "W_U", "b_U", "W_pos")


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    differ = 0
    print(f"{'model':16s} {'theirs':>7s} {'in common':>9s} {'largest difference':>19s}")
    for name in names:
        try:
            net, inputs, bridge = _bridged(name)
        except Exception as error:  # noqa: BLE001 - of whatever kind: it does not take this model
            print(f"{name:16s} TransformerLens: {str(error).splitlines()[0][:70]}")
            continue
        with torch.no_grad():
            differ += not _is_alike(name, net, inputs, bridge)
    return differ


def _bridged(name: str) -> tuple[Any, dict[str, Any], Any]:
    from transformer_lens.model_bridge.sources import _bridge_builder as builder

    net, inputs = make(name, attn="eager")  # which it needs
    inner = copy.deepcopy(net)
    inner.config.architectures = [type(net).__name__]
    bridge = builder.build_bridge_from_module(
        inner, type(net).__name__, hf_config=inner.config, dtype=torch.float32, device="cpu"
    )
    inputs = {"input_ids": inputs["input_ids"]}
    bridge.run_with_cache(inputs["input_ids"])
    return net, inputs, bridge


def _is_alike(name: str, net: Any, inputs: dict[str, Any], bridge: Any) -> bool:
    model: Any = LanguageModel(net)
    _, theirs = bridge.run_with_cache(inputs["input_ids"])
    _, ours = model.run_with_cache(**inputs)
    common = [key for key in theirs if key in ours]
    off = {key: _difference(ours[key], theirs[key]) for key in common}
    worst = max(off, key=off.__getitem__)
    print(f"{name:16s} {len(list(theirs)):7d} {len(common):9d} {off[worst]:19.1e}")
    wrong = [key for key in common if off[key] > CLOSE]
    for key in wrong[:5]:
        print(f"    {key}: {off[key]:.1e}, {tuple(ours[key].shape)}, {tuple(theirs[key].shape)}")
    return not wrong


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference; without bound where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours.float() - theirs.float()).abs().max().item()


def processed(name: str) -> Iterator[tuple[str, float]]:
    """Each weight that both have after processing, and the largest difference."""
    net, _, bridge = _bridged(name)
    bridge.enable_compatibility_mode(disable_warnings=True)
    model: Any = LanguageModel(net).processed()
    for weight in (*WEIGHTS, *WEIGHTS_OF_ALL):
        yield weight, _difference(getattr(model, weight), getattr(bridge, weight))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or NAMES))
