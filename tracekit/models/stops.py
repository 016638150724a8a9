"""Where each row of a generation stopped, and the tokens it had, told by a stopping criterion."""

from __future__ import annotations

from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from tracekit.errors import UnsupportedError
from tracekit.models.recompute import generation_settings


def as_list(criteria: Any) -> list[Any]:
    """Stopping criteria (None, one, a list of them, or transformers' own list) as a list."""
    if criteria is None:
        return []
    return list(criteria) if isinstance(criteria, (list, tuple)) else [criteria]


@final
class Stops:
    """Stands in the place of some stopping criteria, and remembers when they stopped which row.

    `watched` are asked, too, and stop nothing: transformers asks those itself.
    """

    def __init__(self, criteria: list[Any], watched: list[Any]) -> None:
        self._criteria = criteria
        self._watched = watched
        self._lengths: Tensor | None = None
        self._start: Tensor | None = None  # what there was before the first step
        self._tokens: Tensor | None = None  # all, with the prompt, at the end of the last step
        self._runs = 0

    def criterion(self) -> Any:
        """What to give to `generate`."""
        return _criterion_class()(self._ask)

    def new_tokens(self, prompt: int, up_to_end: Tensor) -> Tensor:
        """How many new tokens each row has, where the others end is `up_to_end`."""
        if self._lengths is None or len(self._lengths) != len(up_to_end):
            return up_to_end
        return torch.minimum(self._lengths.to(up_to_end) - prompt, up_to_end)

    def only_run(self) -> Tensor:
        """The tokens of a generation in one run of steps. UnsupportedError if it had several."""
        if self._runs != 1 or self._tokens is None:
            raise UnsupportedError(
                "return_cache= is one pass over all tokens, and this was generated in several "
                "runs (as long audio is, piece by piece): generate from one piece."
            )
        return self._tokens

    def behind_start(self, sequences: Tensor) -> Tensor:
        """New tokens behind what their generation, in one run, began with."""
        self.only_run()
        assert self._start is not None
        starts = self._start[:: len(self._start) // len(sequences)]
        return torch.cat([starts[: len(sequences)].to(sequences), sequences], 1)

    def _ask(self, tokens: Tensor, scores: Any, **more: Any) -> Tensor:
        if self._tokens is None or tokens.shape[1] <= self._tokens.shape[1]:
            self._runs += 1
            self._start = tokens[:, :-1]
            self._lengths = torch.full((len(tokens),), torch.iinfo(torch.long).max)
        self._tokens = tokens
        stopped = self._any_of(self._criteria, tokens, scores, more)
        self._note(stopped | self._any_of(self._watched, tokens, scores, more), tokens.shape[1])
        return stopped

    def _any_of(self, criteria: list[Any], tokens: Tensor, scores: Any, more: Any) -> Tensor:
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for criterion in criteria:
            stopped |= torch.as_tensor(criterion(tokens, scores, **more), device=tokens.device)
        return stopped

    def _note(self, stopped: Tensor, length: int) -> None:
        if self._lengths is not None and len(self._lengths) == len(stopped):
            longest = torch.where(stopped.cpu(), length, torch.iinfo(torch.long).max)
            self._lengths = torch.minimum(self._lengths, longest)


def watching(module: Any, given: dict[str, Any]) -> tuple[Stops, list[Any]]:
    """Stops, and the stopping criteria that are to be given to `generate` with them.

    The criteria of transformers of which `generate` makes its own stay what they are.
    """
    from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

    own = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
    criteria = as_list(given.get("stopping_criteria"))
    kept = [each for each in criteria if isinstance(each, own)]
    ends = [each for each in kept if isinstance(each, EosTokenCriteria)]
    others = [each for each in criteria if not isinstance(each, own)]
    stops = Stops(others, [*ends, *_of_strings(module, given)])
    return stops, [*kept, stops.criterion()]


def _of_strings(module: Any, given: dict[str, Any]) -> list[Any]:
    """The criterion of `stop_strings`."""
    strings, tokenizer = generation_settings(module, given).stop_strings, given.get("tokenizer")
    if not strings or tokenizer is None:
        return []
    from transformers import StopStringCriteria

    return [StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]


@cache
def _criterion_class() -> Any:
    """Made once, when transformers is first needed: importing it takes seconds."""
    from transformers import StoppingCriteria

    class OfStops(StoppingCriteria):
        """Asks a function."""

        def __init__(self, ask: Any) -> None:
            self._ask = ask

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return self._ask(input_ids, scores, **kwargs)

    return OfStops
