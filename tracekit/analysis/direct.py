"""Direct logit attribution in one call: what each component adds to a difference of logits."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tracekit.analysis.attribution import logit_attrs
from tracekit.analysis.components import Components
from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Tokens, logit, logit_difference, token_ids
from tracekit.analysis.parts import stack_head_results
from tracekit.analysis.prompts import Prompts, numbered, read_prompts
from tracekit.analysis.residual import decompose_resid
from tracekit.capture import showing_own_lines
from tracekit.core.offload import at_hand
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache

BY: Final = ("component", "head")


@showing_own_lines
@torch.no_grad()
def direct_logit_attribution(
    model: LanguageModel,
    input: Any,
    right: Tokens,
    wrong: Tokens | None = None,
    by: str = "component",
) -> Labelled:
    """What each part of the residual stream adds to a logit at the last token: `[component]`.

    To the logit of `right`, or to that of `right` less that of `wrong`; the mean over prompts.
    Components are embeddings, what each layer adds, and "bias" (of the final norm and the
    unembedding): they add up to what the unembedding gives, before any scale or cap behind it.
    by="head" is `[layer, head]`, the heads alone. What goes through later layers counts for these.
    Elhage et al. 2021; logit_attrs is the same of any stack, at any position.
    """
    if by not in BY:
        raise InputError(f"by= is 'component' or 'head', not {by!r}.")
    prompts = read_prompts(model, input)
    _, cache = model.run_with_cache(**prompts.inputs)
    what = (logit(model, right) if wrong is None else logit_difference(model, right, wrong)).name
    if by == "component":
        added = _added(model, cache, decompose_resid(model, cache), prompts, right, wrong)
        bias = _bias(model, right, wrong, len(prompts))
        values = torch.cat([added.values, bias.to(added.values)[None]])
        return Labelled(values, [Axis("component", (*added.labels, "bias"))], what)
    heads = _added(model, cache, stack_head_results(model, cache), prompts, right, wrong)
    return _by_head(heads, what)


def _added(
    model: LanguageModel,
    cache: NamedCache,
    stack: Components,
    prompts: Prompts,
    right: Tokens,
    wrong: Tokens | None,
) -> Components:
    """The mean over prompts of what each part adds at their last tokens: `[components]`."""
    each = logit_attrs(
        model, cache, stack, _one(model, right, prompts), _one(model, wrong, prompts)
    )
    at = torch.stack([prompts.at_last(part) for part in each])
    return Components(at.mean(-1), stack.labels)


def _one(model: LanguageModel, tokens: Tokens | None, prompts: Prompts) -> Any:
    """One id for each prompt, `[prompts]`."""
    if tokens is None:
        return None
    ids = token_ids(model, tokens)
    if len(ids) not in (1, len(prompts)):
        raise InputError(
            f"{len(ids)} tokens for {len(prompts)} prompts: give one, or one for each."
        )
    return torch.tensor(ids).expand(len(prompts))


def _bias(model: LanguageModel, right: Tokens, wrong: Tokens | None, count: int) -> Tensor:
    """What the biases of the final norm and the unembedding add, the mean over prompts."""
    found = torch.zeros(())
    for tokens, sign in ((right, 1), (wrong, -1)):
        if tokens is None:
            continue
        ids = torch.tensor(token_ids(model, tokens)).expand(count)
        norm, unembed = at_hand(model.final_norm.module), at_hand(model.unembed.module)
        if getattr(norm, "bias", None) is not None:
            directions = model.tokens_to_residual_directions(ids)
            found = found + sign * (directions @ norm.bias.to(directions.device)).mean().cpu()
        if getattr(unembed, "bias", None) is not None:
            found = found + sign * unembed.bias[ids].mean().cpu()
    return found


def _by_head(heads: Components, what: str) -> Labelled:
    """Parts labelled "L3H0" as layer by head."""
    places = [label.removeprefix("L").split("H") for label in heads.labels]
    layers = list(dict.fromkeys(layer for layer, _ in places))
    if len(places) % len(layers):
        raise InputError("its layers have different numbers of heads: use stack_head_results.")
    values = heads.values.reshape(len(layers), -1)
    return Labelled(values, [Axis("layer", tuple(layers)), numbered("head", values.shape[1])], what)
