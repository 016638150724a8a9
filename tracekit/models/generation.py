"""Run `generate` so that each decoding iteration is noticed, and nothing compiled hides hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tracekit.core.nest import tensors
from tracekit.core.tree import Tree
from tracekit.models.eager import eager
from tracekit.models.lengths import count_steps
from tracekit.models.passes import Passes, asked, has_beams, tell_forward
from tracekit.models.rerun import Rerun
from tracekit.models.signatures import accepts, by_name, by_name_of_forward, is_transformers
from tracekit.models.stops import as_list, watching
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.sharded import check_tokens, draw_alike


def generation(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
    """The call of the root's `generate(*args, **kwargs)`."""
    count = partial(count_steps, tree.root, args, kwargs)
    return TracedCall(lambda follower: generate(tree, follower, args, kwargs), count)


def generate(
    tree: Tree, follower: Follower | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the root's `generate(*args, **kwargs)` returns; `follower` is told of each iteration.

    Steps are not found by counting forward passes: a prompt in chunks takes several, guidance
    doubles them, assisted decoding runs fewer. A stopping criterion is asked exactly once in
    each iteration. `progress=True` shows a bar.
    """
    if tree.planner is not None:
        args, kwargs = tree.planner.given(args, kwargs)
    kwargs = dict(kwargs)
    if is_transformers(tree.root) and kwargs.pop("progress", False):
        from tqdm.auto import tqdm

        bar: Any = tqdm(total=kwargs.get("max_new_tokens"), desc="generate", unit="step")
        given = kwargs.get("stopping_criteria")
        kwargs["stopping_criteria"] = _with_end_of_step(given, lambda _: bar.update())
        with bar:
            return _generate(tree, follower, args, kwargs)
    return _generate(tree, follower, args, kwargs)


def _generate(
    tree: Tree, follower: Follower | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    module: Any = tree.root
    if follower is None:
        draw_alike(tree)
        with tree.guard():
            return module.generate(*args, **_with_list_of_criteria(module, kwargs))
    if not is_transformers(module):
        with eager(tree):
            return module.generate(*args, **kwargs)
    given = by_name(module, args, kwargs)
    stops, criteria = None, given.get("stopping_criteria")
    if criteria or asked(module, given, "stop_strings"):
        stops, criteria = watching(module, given)
    passes = Passes(tree, follower.timeline, given, stops)
    follower.timeline.rerun = Rerun(tree, given)

    def end_step(ids: Tensor) -> None:
        check_tokens(tree, ids)
        if not passes.is_about_a_draft():
            passes.end_step(ids)
            follower.end_step()

    options = {"disable_compile": True, **given}
    options["stopping_criteria"] = _with_end_of_step(criteria, end_step)
    is_dict_added = _needs_lineage(module, given)
    if is_dict_added:
        options["return_dict_in_generate"] = True
    with eager(tree), passes:
        result = module.generate(**options)
        passes.finish(result)
    return getattr(result, "sequences", result) if is_dict_added else result


def _needs_lineage(module: Any, given: dict[str, Any]) -> bool:
    """Whether it is to be told which beam each token came from, though nobody asked for that."""
    return has_beams(module, given) and not asked(module, given, "return_dict_in_generate")


def forward(
    tree: Tree, follower: Follower | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One forward pass, run as Python; `follower` is told which tokens it goes over."""
    if tree.planner is not None:
        args, kwargs = tree.planner.given(args, kwargs)
    if follower is not None and follower.timeline.is_wanted:
        given = by_name_of_forward(tree.root, args, kwargs)
        tell_forward(tree.root, follower.timeline, given)
    return run(tree, args, kwargs)


def run(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass, run as Python."""
    with eager(tree), tree.guard():
        return tree.root(*args, **kwargs)


def of_a_forward(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a generation, those of a forward pass."""
    taken = {name: value for name, value in kwargs.items() if accepts(module, name)} or dict(kwargs)
    first = next(tensors(taken), None)
    if first is not None and getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        some = torch.arange(2, device=first.device).repeat(first.shape[0], 1)  # any two tokens
        taken.setdefault("decoder_input_ids", some)
    elif first is not None and first.dim() > 1 and accepts(module, "position_ids"):
        columns = torch.arange(
            first.shape[1], device=first.device
        )  # generate gives every row its own
        taken.setdefault("position_ids", columns.repeat(first.shape[0], 1))
    return taken


def _with_list_of_criteria(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    given = kwargs.get("stopping_criteria")
    if given is None or not is_transformers(module):
        return kwargs
    return {**kwargs, "stopping_criteria": as_list(given)}


def _with_end_of_step(given: Any, end_step: Callable[[Tensor], None]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([*as_list(given), _end_of_step_class()(end_step)])


@cache
def _end_of_step_class() -> Any:
    """Made once, when transformers is first needed: importing it takes seconds."""
    from transformers import StoppingCriteria

    class EndOfStep(StoppingCriteria):
        """Never stops; says that an iteration has ended."""

        def __init__(self, end_step: Callable[[Tensor], None]) -> None:
            self._end_step = end_step

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self._end_step(input_ids)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return EndOfStep
