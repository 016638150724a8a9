"""Guess the family of a model from its structure, and publish only what its numbers prove."""

# Names of modules say what they may be; they do not say how a block adds up. So several
# declarations are tried, the most specific first, and one is taken only if a forward pass proves
# its residual stream. A name that is wrong under it is left out, with the claim that failed.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from torch import nn

from tracekit.architectures.binding import Names
from tracekit.architectures.check import prove
from tracekit.architectures.findings import Claim, Proof
from tracekit.architectures.layouts import HeadByHead, OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Lacks, Residual, Stack
from tracekit.architectures.witness import Run
from tracekit.core.quirks import own_children

_PARTS: Final = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe"),
}
_IN_ATTENTION: Final = {
    "q": ("q_proj", "query", "q_lin", "wq", "q"),
    "k": ("k_proj", "key", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "v_lin", "wv", "v"),
    "qkv": ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv"),
    "o": ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo", "Wo", "proj"),
}
_IN_MLP: Final = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "down": ("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h"),
}
_INSIDE: Final = ("attn_q", "attn_k", "attn_v", "scores", "pattern")
_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS: Final = ("lm_head", "embed_out", "output", "head", "unembed")


def inferred(root: nn.Module, run: Run) -> Names | None:
    """The names of a model of no declared family, as far as one forward pass proves them."""
    for family in _guesses(root):
        names = Names(family, root)
        if not names.stacks or not names.layers.keys() - {""}:
            continue
        wrong = prove(names, run, with_writes=False).failed
        if not any(claim.name in ("resid_mid", "resid_post") for claim in wrong):
            found = _proved(family, root, run)
            if found is not None:
                return found
    return None


def _proved(family: Family, root: nn.Module, run: Run) -> Names | None:
    """The names of `family` without those that a proof refutes; None if the stream is refuted."""
    proof = prove(Names(family, root), run)
    found = [*proof.failed, *_unseen(proof)]
    if any(claim.name in ("resid_pre", "resid_mid", "resid_post") for claim in found):
        return None
    if {"q", "k", "v"} & {claim.name for claim in found} and "qkv" in _words(family):
        return None  # laid out in another way, perhaps
    known = _without(family, found)
    names = Names(known, root)
    return names if found == [] or prove(names, run) else None


def _unseen(proof: Proof) -> list[Claim]:
    """What attention has inside, where no query was seen to be what it is given as query."""
    if any(claim.is_right and claim.name == "q" and "query" in claim.claim for claim in proof):
        return []
    why = "no attention function was seen to be given its queries"
    return [Claim("", name, why, False) for name in _INSIDE]


def _words(family: Family) -> set[str]:
    return {word for stack in family.stacks.values() for word in stack.blocks[0].modules}


def _without(family: Family, wrong: list[Claim]) -> Family:
    """`family` without the names that `wrong` is about, each with the first reason."""
    reasons: dict[str, Lacks] = {}
    for claim in wrong:
        why = f"it was looked for by structure, and is not what it should be: {claim.claim}"
        reasons.setdefault(claim.name, Lacks(why))
    stacks = {
        word: replace(
            stack,
            blocks=tuple(
                replace(block, activations={**block.activations, **reasons})
                for block in stack.blocks
            ),
        )
        for word, stack in family.stacks.items()
    }
    return replace(family, stacks=stacks, activations={**family.activations, **reasons})


# -- guessing -------------------------------------------------------------------------------------


def _guesses(root: nn.Module) -> Iterator[Family]:
    """Declarations that may hold, the most specific first."""
    stack = _list_of_layers(root)
    if stack is None:
        return
    path, layer = stack
    for block in _blocks(layer):
        kind = type(root).__name__
        yield Family(
            f"{kind} (by its structure)",
            model_types=(),
            modules=dict(_root_modules(root, path)),
            stacks={"layers": Stack(path, (block,))},
        )


def _list_of_layers(root: nn.Module) -> tuple[str, nn.Module] | None:
    """The path of the only list of blocks that is in no other, and its first; None if unclear."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in root.named_modules():
        children = [child for child in own_children(module).values() if child is not None]
        is_inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        is_list = isinstance(module, nn.ModuleList) and not is_inside
        if is_list and len({type(child) for child in children}) == 1:
            found.append((path, children[0]))
    return found[0] if len(found) == 1 else None


def _root_modules(root: nn.Module, layers: str) -> Iterator[tuple[str, str]]:
    inside = f"{layers}."
    outside = {path: each for path, each in root.named_modules() if not path.startswith(inside)}
    order = list(outside)
    for path, module in outside.items():
        last = path.rpartition(".")[2]
        if last in _EMBEDDINGS and isinstance(module, nn.Embedding):
            yield "embed", path
        elif last in _HEADS and isinstance(module, nn.Linear):
            yield "unembed", path
        elif _is_norm(module) and order.index(path) > order.index(layers):
            yield "final_norm", path


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _blocks(layer: nn.Module) -> Iterator[Block]:
    modules = dict(_modules_of(layer))
    norms = [name for name, child in own_children(layer).items() if _is_norm_of(child)]
    layouts: tuple[Any, ...] = (
        (OneBehindTheOther, HeadByHead) if "qkv" in modules else (None,)
    )  # queries and keys tell which
    for fused in layouts:
        for residual, words in _ARRANGEMENTS:
            if len(words) == len(norms):
                named = {**dict(zip(words, norms, strict=True)), **modules}
                yield Block(named, residual=residual, fused=fused)


def _is_norm_of(child: nn.Module | None) -> bool:
    return child is not None and _is_norm(child)


_ARRANGEMENTS: Final[tuple[tuple[Residual, tuple[str, ...]], ...]] = (
    (Residual.SEQUENTIAL, ("norm1", "norm2")),
    (Residual.SEQUENTIAL, ("norm1_post", "norm2_post")),
    (Residual.SEQUENTIAL, ("norm1", "norm1_post", "norm2", "norm2_post")),
    (Residual.POST_NORM, ("norm1", "norm2")),
    (Residual.PARALLEL, ("norm1",)),
    (Residual.PARALLEL, ("norm1", "norm2")),
)


def _modules_of(layer: nn.Module) -> Iterator[tuple[str, str]]:
    for word, synonyms in _PARTS.items():
        name = _first(layer, synonyms)
        if name is None:
            continue
        yield word, name
        part: Any = own_children(layer)[name]
        for inner, known in (_IN_ATTENTION if word == "attn" else _IN_MLP).items():
            found = _first(part, known)
            if found is not None:
                yield inner, f"{name}.{found}"


def _first(module: nn.Module, synonyms: tuple[str, ...]) -> str | None:
    children = own_children(module)
    return next((name for name in synonyms if children.get(name) is not None), None)
