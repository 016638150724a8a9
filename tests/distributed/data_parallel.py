"""What is asked of a model whose ranks have batches of their own: tensors by name."""

from __future__ import annotations

import torch
from torch import Tensor

from tracekit import LanguageModel

IDS_OF_RANK = (torch.arange(10, 18).view(2, 4), torch.arange(40, 52).view(2, 6))
Found = dict[str, Tensor]


def reads(model: LanguageModel, ids: Tensor) -> Found:
    with torch.no_grad(), model.trace(ids) as tracer:
        q = model.model.layers[0].self_attn.q_proj.output
        into = model.model.layers[1].input
        last = model.model.layers[1].output
        logits = tracer.result.logits
    return {"q": q, "into": into, "last": last, "logits": logits}


def edits(model: LanguageModel, ids: Tensor) -> Found:
    with torch.no_grad(), model.trace(ids) as tracer:
        model.model.layers[0].self_attn.q_proj.output[..., :9] = 0
        model.model.layers[0].output = model.model.layers[0].output * 2
        logits = tracer.result.logits
    return {"logits": logits}


def unlike(model: LanguageModel, ids: Tensor) -> Found:
    """Ranks may do different things: each has its own rows."""
    with torch.no_grad(), model.trace(ids) as tracer:
        if ids.shape[1] == 4:
            model.model.layers[0].output[:] = 0
        logits = tracer.result.logits
    return {"logits": logits}


def cached(model: LanguageModel, ids: Tensor) -> Found:
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    # What is inside a norm is told by its weights, and outside of the forward these are sharded.
    found = {str(key): cache[key].nan_to_num(neginf=0) for key in cache}
    return {key: value for key, value in found.items() if "norm" not in key}


def gradients(model: LanguageModel, ids: Tensor) -> Found:
    with model.trace(ids) as tracer:
        q = model.model.layers[0].self_attn.q_proj.output
        q.retain_grad()
        h = model.model.layers[0].output
        h.retain_grad()
        loss = tracer.result.logits[:, -1].logsumexp(-1).sum()
        loss.backward()
    model.module.zero_grad()
    return {"q": q.grad, "h": h.grad}


def stopped(model: LanguageModel, ids: Tensor) -> Found:
    with torch.no_grad(), model.trace(ids) as tracer:
        h = model.model.layers[0].output
        tracer.stop()
    return {"h": h}


def after_a_stop(model: LanguageModel, ids: Tensor) -> Found:
    with torch.no_grad():
        return {"logits": model.module(ids).logits}


def generated(model: LanguageModel, ids: Tensor) -> Found:
    with model.generate(ids, max_new_tokens=3, do_sample=False) as tracer:
        h = model.model.layers[0].output
        tokens = tracer.result
    return {"tokens": tokens, "h": h}


def weights(model: LanguageModel, ids: Tensor) -> Found:
    return {name: getattr(model, name).detach() for name in ("W_Q", "W_U", "W_E")}


blocks = (
    reads, edits, unlike, cached, gradients, stopped, after_a_stop, generated, weights,
)  # fmt: skip
