"""Numbers against TransformerLens: what both have of a model, by its hook names, and its weights.

    python benchmarks/against_transformer_lens.py [gpt2 llama …]

Each model of the tests' matrix (or those named) that TransformerLens takes is run by both, on the
same weights: `run_with_cache` by the names in common, then the weights in common as they are, and
(where both process them) after its `enable_compatibility_mode()` and our `model.processed()`. Where
it means something else by a name, KNOWN says why, and what of ours has its numbers. The exit status
is the number of models that differ in anything else.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.tiny_models import NAMES, make  # noqa: E402
from tracekit import LanguageModel  # noqa: E402
from tracekit.architectures.hook_names import STACKS  # noqa: E402
from tracekit.core.words import ROOT_WEIGHTS  # noqa: E402
from tracekit.errors import TracekitError  # noqa: E402

CLOSE: Final = 1e-5  # float32
MASKED: Final = -1e30  # below it a score is a mask's: of -inf, or of the least of its dtype
OF_LAYERS: Final = ("Q", "K", "V", "O", "in", "gate", "out")
WEIGHTS: Final = (
    *(f"{kind}_{of}" for kind in "Wb" for of in OF_LAYERS),
    *("W_E", "W_pos", "W_U", "b_U"),
)
INFINITE: Final = float("inf")

Pair = tuple[Tensor, Tensor]


class Known(NamedTuple):
    """A name by which TransformerLens means something else."""

    models: str  # separated by spaces, as fnmatch has them
    names: str
    why: str
    same: Callable[[Any, Tensor, str], Pair] | None = None  # what must be equal instead


def word(name: str) -> Callable[[Any, Tensor, str], Pair]:
    """It is ours by another name, of the same layer."""
    return lambda ours, theirs, key: (ours[f"{layer(key)}{name}"], theirs)


def layer(key: str) -> str:
    """`layers.3.` of `blocks.3.hook_z`; nothing, of a name of the whole model."""
    found = re.match(r"(\w*blocks)\.(\d+)\.", key)
    return f"{STACKS[found[1]]}.{found[2]}." if found else ""


def added(first: str, second: str) -> Callable[[Any, Tensor, str], Pair]:
    """It is the sum of two of ours."""
    return lambda ours, theirs, key: (ours[layer(key) + first] + ours[layer(key) + second], theirs)


def less_largest(ours: Any, theirs: Tensor, key: str) -> Pair:
    """Both, less the largest score of each row."""
    scores = ours[key]
    seen = scores > MASKED
    known = theirs.masked_fill(~seen, MASKED)
    both = (each - each.amax(-1, keepdim=True) for each in (scores, known))
    left, right = (each.masked_fill(~seen, 0) for each in both)
    return left, right


def without_mean(ours: Any, theirs: Tensor, key: str) -> Pair:
    """As ours would be if the norm took the mean off; of the normed it would be no T5's norm."""
    at, norm = layer(key), "norm1" if ".ln1." in key else "norm2"
    given = ours[at + f"{norm}_normalized"] * ours[at + f"{norm}_scale"]
    given = given - given.mean(-1, keepdim=True)
    scale = (given.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (scale if key.endswith("scale") else given / scale), theirs


def half_of_heads(which: int) -> Callable[[Any, Tensor, str], Pair]:
    """It is each head's queries and gates in one."""
    return lambda ours, theirs, key: (
        ours[key],
        theirs.reshape(*ours[key].shape[:3], 2, -1)[..., which, :],
    )


POST_NORM: Final = "bert roberta bart marian wav2vec2"
KNOWN: Final = (
    Known(
        "gptj gpt_neo opt bert roberta vit wav2vec2 ast bart marian llama4_text jamba",
        "*hook_attn_scores",
        "its hook_attn_scores is handed the pattern, where Hugging Face returns nothing else",
        lambda ours, theirs, key: (ours[key.replace("attn_scores", "pattern")], theirs),
    ),
    Known(
        "t5gemma",
        "*.cross_attn.hook_attn_scores",
        "its hook_attn_scores of cross-attention is handed the pattern",
        word("cross_pattern"),
    ),
    Known(
        "bart marian t5 t5gemma",
        "decoder_blocks.*.ln2.*",
        "its ln2 of a decoder is the norm of cross-attention; its ln3 is norm2",
    ),
    Known(
        "t5",
        "encoder_*.ln[12].hook_* decoder_*.ln[13].hook_*",
        "it takes T5's norms for LayerNorms: its scale is of what has no mean",
        without_mean,
    ),
    Known(
        "gpt_oss",
        "*hook_attn_scores",
        "Hugging Face takes each row's largest score off before the softmax; its scores have it",
        less_largest,
    ),
    Known(
        "bloom bert roberta",
        "hook_embed",
        "its hook_embed is behind the norm of the embeddings: our resid_pre of layer 0",
        lambda ours, theirs, key: (ours["resid_pre", 0], theirs),
    ),
    Known(
        "bert roberta",
        "*.hook_attn_out",
        "its hook_attn_out of a post-norm block is behind the norm: our resid_mid",
        word("resid_mid"),
    ),
    Known(
        POST_NORM,
        "decoder_blocks.*.hook_resid_mid",
        "its hook_resid_mid of a post-norm decoder is what the norm of cross-attention is given",
        added("resid_cross", "cross_attn_out"),
    ),
    Known(
        POST_NORM,
        "*.hook_resid_mid",
        "its hook_resid_mid of a post-norm block has the MLP in it: it is what norm2 is given",
        added("resid_mid", "mlp_out"),
    ),
    Known(
        "t5 t5gemma",
        "decoder_blocks.*.hook_resid_mid",
        "its hook_resid_mid of a decoder is in front of cross-attention: our resid_cross",
        word("resid_cross"),
    ),
    Known(
        "bart marian",
        "*embed*",
        "its embed and pos_embed are the encoder's; ours the decoder's, its decoder_embed",
    ),
    Known("vit", "*.hook_mlp_in", "its hook_mlp_in is behind norm2 here, elsewhere in front"),
    Known(
        "deepseek_v3",
        "*.hook_q",
        "its hook_q is behind the rotary embedding, heads first: our attn_q",
        lambda ours, theirs, key: (ours[f"{layer(key)}attn_q"], theirs.transpose(1, 2)),
    ),
    Known(
        "deepseek_v3",
        "*.hook_rot_[qk]",
        "its hook_rot_q and hook_rot_k are the rotary part alone (one for all heads, of keys)",
        lambda ours, theirs, key: (
            ours[key][:, :, : theirs.shape[2], -theirs.shape[3] :],
            theirs,
        ),
    ),
    Known(
        "deepseek_v3",
        "*.hook_z",
        "its hook_z is split as if heads were as wide as d_head, which is not that of values",
        lambda ours, theirs, key: (ours[key].flatten(2), theirs.flatten(2)),
    ),
    Known(
        "llama4_text",
        "*.mlp.router.hook_out",
        "its router.hook_out is the first of what the router gives: our router_weights",
        word("router_weights"),
    ),
    Known(
        "rwkv",
        "blocks.0.hook_in blocks.0.hook_resid_pre",
        "its first block begins in front of pre_ln, which norms the embeddings: our embed_out",
        lambda ours, theirs, key: (ours["embed_out"], theirs),
    ),
    Known(
        "qwen3_next",
        "*.hook_q *.q.hook_out",
        "its hook_q has the gates of attention in it, as projected",
        half_of_heads(0),
    ),
    Known(
        "qwen3_next",
        "*.hook_q_gate",
        "its hook_q_gate has all heads in one axis",
        lambda ours, theirs, key: (ours[key].flatten(2), theirs),
    ),
    Known("qwen3_next", "*.hook_z", "its hook_z is gated: our z_gated", word("z_gated")),
)
KNOWN_WEIGHTS: Final = (
    Known(
        "gemma gemma2 gemma3 gemma3_text",
        "W_E",
        "our W_E is what the embedding gives, times the square root of its width",
        lambda ours, theirs, name: (ours[name], theirs * theirs.shape[1] ** 0.5),
    ),
    Known("bart", "W_pos", "its W_pos is the encoder's; ours the decoder's"),
)
# After processing.
KNOWN_PROCESSED: Final = (
    *KNOWN_WEIGHTS,
    Known(
        "bloom bert roberta rwkv",
        "W_O W_out W_E W_pos b_O b_out",
        "it centres what writes into a stream that norms write into, too; ours leaves that out",
    ),
    Known(
        "cohere2",
        "W_gate",
        "of what reads a LayerNorm it centres all but W_gate",
        lambda ours, theirs, name: (ours[name], theirs - theirs.mean(-2, keepdim=True)),
    ),
    Known(
        "cohere2",
        "W_U",
        "its W_U has the model's scale of logits folded in",
        lambda ours, theirs, name: (ours[name] * ours["logit_scale"], theirs),
    ),
)


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # TransformerLens says which layers of hybrids it stacks
    print(f"{'':16s}     run_with_cache          weights      processed")
    print(f"{'model':16s} theirs  both  differ   both  differ   both  differ")
    return sum(not _is_alike(name) for name in names)


def _is_alike(name: str) -> bool:
    """Print a line for one model; whether nothing unknown differs, or it is not taken."""
    try:
        net, inputs, bridge = _bridged(name)
        with torch.no_grad():
            _, theirs = bridge.run_with_cache(**_for_bridge(inputs))
    except Exception as error:  # noqa: BLE001 - of whatever kind: it does not take this model
        print(f"{name:16s} not taken: {str(error).splitlines()[0][:80]}")
        return True
    model: Any = LanguageModel(net)
    with torch.no_grad():
        _, ours = model.run_with_cache(**inputs)
        found = [
            Comparison(name, KNOWN, ours, {key: theirs[key] for key in theirs if key in ours}),
            Comparison(name, KNOWN_WEIGHTS, *_weights(model, bridge)),
            _processed(name, model, bridge),
        ]
    parts = [f"{len(each.off):6d} {each.worst:7.0e}" if each else f"{'-':>14s}" for each in found]
    print(f"{name:16s} {len(list(theirs)):6d}{' '.join(parts)}")
    for each in found:
        for line in each.lines() if each else ():
            print(f"    {line}")
    return not any(each.wrong() for each in found if each)


class Comparison:
    """What both have of one model, and how far apart it is."""

    def __init__(
        self, model: str, known: tuple[Known, ...], ours: Any, theirs: dict[str, Tensor]
    ) -> None:
        self.off: dict[str, float] = {}
        self.why: dict[str, None] = {}
        for name, value in theirs.items():
            here = _known(known, model, name)
            pair = _alike(name, ours[name] if here is None else None, value)
            if here is not None:
                self.why[here.why] = None
                pair = here.same(ours, value, name) if here.same else None
            if pair is not None:
                self.off[name] = _difference(*pair)

    @property
    def worst(self) -> float:
        return max(self.off.values(), default=0.0)

    def wrong(self) -> list[str]:
        """What differs."""
        return [name for name, off in self.off.items() if not off <= CLOSE]

    def lines(self) -> list[str]:
        """What is to be said of it."""
        return [f"{name}: {self.off[name]:.1e}" for name in self.wrong()] + list(self.why)


def _known(known: tuple[Known, ...], model: str, name: str) -> Known | None:
    def is_one_of(patterns: str, text: str) -> bool:
        return any(fnmatch(text, each) for each in patterns.split())

    return next(
        (each for each in known if is_one_of(each.models, model) and is_one_of(each.names, name)),
        None,
    )


def _alike(key: str, ours: Tensor | None, theirs: Tensor) -> Pair | None:
    """Both, in one shape and with the same masks."""
    if ours is None:
        return None
    if ours.shape[:1] == (1,) and "pos_embed" in key:
        theirs = theirs[:1]  # of one row: they repeat it
    if ours.dim() == theirs.dim() - 1 and ours.shape[0] == theirs.shape[0] * theirs.shape[1]:
        ours = ours.unflatten(0, theirs.shape[:2])  # rows and positions in one axis, in the model
    if key.endswith("hook_attn_scores") and ours.shape == theirs.shape:
        ours = torch.where(ours < MASKED, theirs, ours)  # the patterns tell what is masked
    return ours, theirs


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; without bound where the shapes differ."""
    if ours.shape != theirs.shape:
        return INFINITE
    return (ours.float() - theirs.float()).abs().max().item()


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
    return {"input": inputs[main], **{key: each for key, each in inputs.items() if key != main}}


# -- weights -------------------------------------------------------------------------------------


def _processed(name: str, model: Any, bridge: Any) -> Comparison | None:
    """After processing; None where either does none."""
    try:
        bridge.enable_compatibility_mode(disable_warnings=True)
        copied = model.processed()
    except Exception:  # noqa: BLE001 - TransformerLens has several kinds for it
        return None
    return Comparison(name, KNOWN_PROCESSED, *_weights(copied, bridge))


def _weights(model: Any, bridge: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that both have."""
    config = model.module.config
    ours = {"logit_scale": torch.tensor(getattr(config, "logit_scale", 1.0))}
    theirs: dict[str, Tensor] = {}
    for name in WEIGHTS:
        here, there = _weight_of(model, name), _weight_there(bridge, name)
        if here is not None and there is not None:
            ours[name], theirs[name] = here, there
    return ours, theirs


def _weight_of(model: Any, name: str) -> Tensor | None:
    if name in ROOT_WEIGHTS:
        return getattr(model, name, None)
    found: list[Tensor] = []
    for stack in ("encoder_layers", "layers"):  # which TransformerLens stacks in this order
        try:
            found.append(model.weights(name, stack)[0])
        except (TracekitError, KeyError):
            continue
    return torch.cat(found) if found else None


def _weight_there(bridge: Any, name: str) -> Tensor | None:
    try:
        return getattr(bridge, name)
    except Exception:  # noqa: BLE001 - of whatever kind: it has none
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(NAMES)))
