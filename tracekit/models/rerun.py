"""One forward pass over the tokens that a run ended with, of a model that nothing here keeps."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, Final, final

import torch

from tracekit.core.tree import Tree
from tracekit.errors import CacheError
from tracekit.models.eager import eager
from tracekit.models.inputs import device_of
from tracekit.models.recompute import forward_inputs
from tracekit.tracing.timeline import NO_TOKEN, Transcript

# What says how to generate, and may hold other models, or all keys and values.
_NOT_KEPT: Final = frozenset(
    {
        "assistant_model",
        "assistant_tokenizer",
        "custom_generate",
        "logits_processor",
        "past_key_values",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "tokenizer",
    }
)


@final
class Rerun:
    """Runs the model of `tree` again, on what was given and the tokens that it ended with."""

    def __init__(self, tree: Tree, given: dict[str, Any]) -> None:
        self._tree = weakref.ref(tree)
        self._root, self._name = weakref.ref(tree.root), tree.name
        kind = _device_type(tree.root)
        is_cast = torch.is_autocast_enabled(kind)
        self._autocast = (kind, torch.get_autocast_dtype(kind)) if is_cast else None
        self._given = {name: value for name, value in given.items() if name not in _NOT_KEPT}

    @property
    def tree(self) -> Tree:
        """The model; CacheError if it is gone."""
        return self._model()

    def told(self) -> dict[str, Any]:
        """What was given, and what was cast: `Rerun.again` makes the same of it."""
        return {"given": self._given, "autocast": self._autocast}

    @classmethod
    def again(cls, tree: Tree, told: dict[str, Any], name: str) -> Rerun:
        """That of a run of the same model, from what it told; `name` begins its paths."""
        made = cls(tree if tree.name == name else Tree(tree.root, name), told["given"])
        made._autocast = told["autocast"]
        return made

    def __call__(self, transcript: Transcript, include_last: bool) -> None:
        """One forward pass, without keys and values, over all tokens, or all but the last."""
        tree = self._model()
        tokens = transcript.tokens
        if bool((tokens[:, : transcript.prompt] == NO_TOKEN).any()):
            tokens = tokens[:, transcript.prompt :]  # the prompt was given embedded
        module: Any = tree.root
        inputs = forward_inputs(
            module,
            self._given,
            tokens.to(device_of(module)),
            new_tokens=transcript.is_real[:, transcript.prompt :].sum(1),
            include_last=include_last,
        )
        with torch.no_grad(), eager(tree), self._as_it_ran():
            module(**inputs)

    def _as_it_ran(self) -> AbstractContextManager[Any]:
        """The casting of the run, whatever casts now."""
        if self._autocast is None:
            return torch.autocast(_device_type(self._model().root), enabled=False)
        kind, dtype = self._autocast
        return torch.autocast(kind, dtype)

    def _model(self) -> Tree:
        tree, root = self._tree(), self._root()
        if tree is None and root is not None:  # the Model was one for the run alone
            tree = Tree(root, self._name)
        if tree is None:
            raise CacheError(
                "the model that this cache was recorded from is gone, and it would have to run "
                "again: keep it, and ask before you delete it."
            )
        return tree


def _device_type(module: Any) -> str:
    device = device_of(module)
    return "cpu" if device is None else device.type
