"""What is asked of a model on one rank, and on several: tensors by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit import LanguageModel
from tracekit.analysis import patch_sweep

IDS = torch.arange(10, 18).view(2, 4)
Found = dict[str, Tensor]


def reads(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        attention = model.model.layers[0].self_attn
        q = attention.q_proj.output
        k = attention.k_proj.output
        o_input = attention.o_proj.input
        attended = attention.output[0]
        mlp = model.model.layers[1].mlp.output
        last = model.model.layers[1].output
        logits = tracer.result.logits
    return dict(
        q=q, k=k, o_input=o_input, attended=attended, mlp=mlp, last=last,
        logits=logits,
    )  # fmt: skip


def inside_attention(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        inside = model.model.layers[0].self_attn.attention
        q = inside.q.output
        scores = inside.scores.output
        pattern = inside.pattern.output
        z = inside.z.output
        z[:, :, 1] = 0
        model.model.layers[1].self_attn.attention.pattern.output[:, 1] = 0.25
        logits = tracer.result.logits
    return dict(q=q, scores=scores.nan_to_num(neginf=0), pattern=pattern, z=z, logits=logits)


def edits_in_place(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        model.model.layers[0].self_attn.q_proj.output[:, 1:, 5:20] = 0
        model.model.layers[0].self_attn.o_proj.input[..., 10:20] *= 2
        model.model.layers[1].output[:, 0] *= 1.5
        logits = tracer.result.logits
    return {"logits": logits}


def writes(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        v = model.model.layers[0].self_attn.v_proj.output
        model.model.layers[0].self_attn.v_proj.output = v.flip(-1)
        logits = tracer.result.logits
    return {"v": v, "logits": logits}


def skips(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        x = model.model.layers[0].self_attn.v_proj.input
        model.model.layers[0].self_attn.v_proj.skip(x[..., :16] * 2)
        h = model.model.layers[1].mlp.input
        model.model.layers[1].mlp.skip(h)
        logits = tracer.result.logits
    return {"logits": logits}


def gradients(model: LanguageModel) -> Found:
    with model.trace(IDS) as tracer:
        q = model.model.layers[0].self_attn.q_proj.output
        q.retain_grad()
        h = model.model.layers[0].output
        h.retain_grad()
        z = model.model.layers[1].self_attn.o_proj.input
        z.retain_grad()
        loss = tracer.result.logits[:, -1].logsumexp(-1).sum()
        loss.backward()
    return {"q": q.grad, "h": h.grad, "z": z.grad}


def cached(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        cache = tracer.cache(include_inputs=True)
    found = {path: cache[path].output for path in cache if "layers.0" in path}
    found |= {f"{path} in": cache[path].input for path in cache if path.endswith("_proj")}
    return {path: it for path, it in found.items() if isinstance(it, Tensor)}


def cached_gradients(model: LanguageModel) -> Found:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(["*.q_proj", "*.layers.1"], include_grads=True)
        loss = tracer.result.logits[:, -1].logsumexp(-1).sum()
    loss.backward()
    return {path: cache[path].grad for path in cache}


def named(model: LanguageModel) -> Found:
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS)
    return {str(key): cache[key].nan_to_num(neginf=0) for key in cache}


def hooked(model: LanguageModel) -> Found:
    def halve(value: Tensor, hook: Any) -> Tensor:
        return value * 0.5

    with torch.no_grad():
        out = model.run_with_hooks(IDS, fwd_hooks=[(("q", 0), halve), (("z", 1), halve)])
    return {"logits": getattr(out, "logits", out)}


def lastingly(model: LanguageModel) -> Found:
    with model.edit() as edited:
        edited.model.layers[0].self_attn.k_proj.output[..., 8:] = 0
    with torch.no_grad(), edited.trace(IDS) as tracer:
        k = model.model.layers[0].self_attn.k_proj.output
        logits = tracer.result.logits
    tokens = edited.generate(IDS, max_new_tokens=4, do_sample=False)
    return {"k": k, "logits": logits, "tokens": tokens}


def generated(model: LanguageModel) -> Found:
    qs = []
    with model.generate(IDS, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            qs.append(model.model.layers[0].self_attn.q_proj.output)
            model.model.layers[0].output *= 1.25
        tokens = tracer.result
    return {"tokens": tokens, "qs": torch.cat(qs, 1)}


def at_positions(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        model.model.layers[0].self_attn.q_proj.output.at([1])[:] = 0.5
        logits = tracer.result.logits
    return {"logits": logits}


def called(model: LanguageModel) -> Found:
    with torch.no_grad(), model.trace(IDS) as tracer:
        h = model.model.layers[0].output
        lens = model.lm_head(model.model.norm(h))
        q = model.model.layers[1].self_attn.q_proj(h)
        o = model.model.layers[1].self_attn.o_proj(h)
        logits = tracer.result.logits
    return {"lens": lens, "q": q, "o": o, "logits": logits}


def weights(model: LanguageModel) -> Found:
    names = ("W_Q", "W_K", "W_O", "W_U", "W_E")
    return {name: getattr(model, name).detach() for name in names}


def swept(model: LanguageModel) -> Found:
    """Every patch is a row of whole forwards here, and goes on from a kept run on one rank."""

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].logsumexp(-1)

    found = patch_sweep(model, IDS[:1], IDS[1:], metric, progress=False, seed=0)
    return {"values": torch.as_tensor(found.values.values)}


def stopped(model: LanguageModel) -> Found:
    with torch.no_grad():
        names = [("q", 0), ("resid_post", 0)]
        _, cache = model.run_with_cache(IDS, names_filter=names, stop_at_layer=1)
    return {str(key): cache[key] for key in cache}


def behind_a_prefix(model: LanguageModel) -> Found:
    prompt = model.prefill(IDS[:1])
    with torch.no_grad(), model.trace(IDS[1:], prefix=prompt) as tracer:
        k = model.model.layers[1].self_attn.k_proj.output
        logits = tracer.result.logits
    return {"k": k, "logits": logits}


OF_EXPERTS = (reads, inside_attention, gradients, cached, named, generated)
ALL = (
    *OF_EXPERTS,
    *(edits_in_place, writes, skips, at_positions, cached_gradients, hooked, lastingly),
    *(called, weights, stopped, swept, behind_a_prefix),
)
