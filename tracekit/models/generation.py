"""Run `generate` so that each decoding iteration is noticed, and nothing compiled hides hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from tracekit.capture import warn_user
from tracekit.core.nest import tensors
from tracekit.core.tree import Tree
from tracekit.models.lengths import count_steps
from tracekit.models.signatures import accepts, by_name, is_transformers
from tracekit.models.stops import as_list
from tracekit.tracing.call import TracedCall


def generation(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
    """The call of the root's `generate(*args, **kwargs)`."""
    count = partial(count_steps, tree.root, args, kwargs)
    return TracedCall(lambda end_step: generate(tree, end_step, args, kwargs), count)


def generate(
    tree: Tree, end_step: Callable[[], None] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the root's `generate(*args, **kwargs)` returns; `end_step` is called in each iteration.

    Steps are not found by counting forward passes: a prompt in chunks takes several, guidance
    doubles them, assisted decoding runs fewer. A stopping criterion is asked exactly once in
    each iteration. `progress=True` shows a bar.
    """
    kwargs = dict(kwargs)
    if is_transformers(tree.root) and kwargs.pop("progress", False):
        from tqdm.auto import tqdm

        bar: Any = tqdm(total=kwargs.get("max_new_tokens"), desc="generate", unit="step")
        kwargs["stopping_criteria"] = _with_end_of_step(kwargs.get("stopping_criteria"), bar.update)
        with bar:
            return _generate(tree, end_step, args, kwargs)
    return _generate(tree, end_step, args, kwargs)


def _generate(
    tree: Tree, end_step: Callable[[], None] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    module: Any = tree.root
    if end_step is None:
        return module.generate(*args, **_with_list_of_criteria(module, kwargs))
    if not is_transformers(module):
        with eager(tree):
            return module.generate(*args, **kwargs)
    kwargs = by_name(module, args, kwargs)
    kwargs["stopping_criteria"] = _with_end_of_step(kwargs.get("stopping_criteria"), end_step)
    kwargs.setdefault("disable_compile", True)
    with eager(tree):
        return module.generate(**kwargs)


def run(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass, run as Python."""
    with eager(tree):
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


def eager(tree: Tree) -> AbstractContextManager[Any]:
    """Run compiled parts as Python: hooks placed after a compilation do not fire in it.

    Says so once for each model.
    """
    if not tree.is_compiled():
        return nullcontext()
    own = tree.original or tree  # nobody knows of twins
    if not own.was_told_eager:
        own.was_told_eager = True
        warn_user(
            f"{type(tree.root).__name__} was compiled by torch; under a trace it runs as Python, "
            f"and slower: what is compiled can't be seen or changed. Outside it stays compiled."
        )
    return torch.compiler.set_stance("force_eager")


def _with_list_of_criteria(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    given = kwargs.get("stopping_criteria")
    if given is None or not is_transformers(module):
        return kwargs
    return {**kwargs, "stopping_criteria": as_list(given)}


def _with_end_of_step(given: Any, end_step: Callable[[], None]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([*as_list(given), _end_of_step_class()(end_step)])


@cache
def _end_of_step_class() -> Any:
    """Made once, when transformers is first needed: importing it takes seconds."""
    from transformers import StoppingCriteria

    class EndOfStep(StoppingCriteria):
        """Never stops; says that an iteration has ended."""

        def __init__(self, end_step: Callable[[], None]) -> None:
            self._end_step = end_step

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self._end_step()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return EndOfStep
