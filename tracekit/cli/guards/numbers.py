"""Experiments on numbers: caches, names, attention and generation beside other ways to them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tracekit.cli.guards.experiment import PROMPT, Experiment, check, first_of, tokens_of
from tracekit.models.language import LanguageModel

_CLOSE: Final = 1e-5  # of attention probabilities, in float32
_NEW: Final = 4  # tokens


def _cache(model: LanguageModel) -> str:
    """Each module's tensor, in a cache and by a hook of plain PyTorch, bit for bit."""
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(device=None)
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(_keeping(seen, f"model.{path}"))
        for path, module in model.module.named_modules()
        if f"model.{path}" in cache and path
    ]
    try:
        model.module(tokens_of(model))
    finally:
        for handle in handles:
            handle.remove()
    inner = [path for path in cache if "." in path]
    wrong = [path for path in inner if path in seen and not _same(cache[path], seen[path])]
    check(not wrong, f"they differ at {', '.join(wrong[:3])}")
    check(len(seen) > 40, f"only {len(seen)} modules ran")
    return f"{len(seen)} modules, bit for bit"


def _same(entry: Any, tensor: Tensor) -> bool:
    return torch.equal(entry.hidden, tensor)


def _keeping(seen: dict[str, Tensor], path: str) -> Any:
    def keep(_module: Any, _args: Any, output: Any) -> None:
        if isinstance(output, (Tensor, tuple)):
            seen[path] = first_of(output).detach().clone()

    return keep


def _names(model: LanguageModel) -> str:
    proof = model.check_names(PROMPT)
    right = sum(claim.is_right is True for claim in proof)
    check(bool(proof), "; ".join(map(str, proof.failed[:3])) or "nothing could be checked")
    return f"{right} claims, {len(proof.open)} could not be checked, {proof.largest:.0e} at most"


def _attention(model: LanguageModel) -> str:
    """The pattern that is read beside SDPA, and the one that the model's eager way returns."""
    eager = LanguageModel("tracekit/tiny", attn_implementation="eager", device=model.device)
    wanted = eager.module(tokens_of(model), output_attentions=True).attentions
    _, cache = model.run_with_cache(PROMPT, names_filter="pattern", device=None)
    far = max(
        (cache["pattern", layer] - pattern).abs().max().item()
        for layer, pattern in enumerate(wanted)
    )
    check(far <= _CLOSE, f"patterns differ by {far:.1e}")
    return f"{len(wanted)} layers, {far:.0e} at most"


def _generation(model: LanguageModel) -> str:
    """One entry for each step, and the tokens of a generation that nobody looks into."""
    module = model.transformer.h[-1]
    with model.generate(PROMPT, max_new_tokens=_NEW, do_sample=False) as tracer:
        cache = tracer.cache(modules=[module])
        tokens = tracer.result
    ids = tokens_of(model)
    plain = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )  # fmt: skip
    steps, lengths = tokens.shape[1] - ids.shape[1], [len(each.hidden[0]) for each in cache[module]]
    check(torch.equal(tokens, plain), "the tokens are others than without a trace")
    check(lengths == [ids.shape[1]] + [1] * (steps - 1), f"the entries have {lengths} positions")
    check(bool(cache.verify()), "one pass over the tokens computes other values")
    return f"{steps} steps, and one pass over the tokens computes the same"


NUMBERS: Final = (
    Experiment("", "a cache holds what plain hooks see", _cache),
    Experiment("", "standard names are what the model's numbers say", _names),
    Experiment("", "patterns read beside SDPA are those of eager attention", _attention),
    Experiment("", "generation: an entry for each step, the same tokens", _generation),
)
