"""The steps of a planned generation: some are run, and what grows alike is said of the others."""

# Behind the prompt each step makes the same values as the one before, longer by one position where
# they are longer at all. So every size is a line over the steps, from the second decode step on;
# what is held at the beginning of a step is a sum of these. Where that does not hold (a window that
# is filled on the way), or where a block asks about single steps, all of them are run.

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from tracekit.core.ledger import Held, Ledger, most_held
from tracekit.models.passes import asked
from tracekit.models.planned_passes import Forwards
from tracekit.tracing.planned import PlannedSite
from tracekit.tracing.quiet import asks_for_nothing
from tracekit.tracing.tracer import Tracer

PROBED: Final = 5  # steps that are run: the prompt, and four
_OF_STEPS: Final = frozenset({"iter", "all", "next", "stop"})
_WINDOWS: Final = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
    "max_window_layers",
)
_UNEVEN: Final = (
    "prefill_chunk_size",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "guidance_scale",
)
_NOT_A_LINE: Final = (
    "sizes do not grow evenly over the steps, so those behind the first {} are estimated: "
    "plan(..., all_steps=True) runs each."
)


@final
@dataclass(frozen=True)
class Told:
    """What is said of all steps."""

    sites: tuple[PlannedSite, ...]
    kv_cache: tuple[int, ...]
    at_peak: dict[str, Held]
    notes: tuple[str, ...]


@final
class Steps:
    """How many steps there are (`count`), and how many are run (`run`)."""

    def __init__(
        self,
        module: Any,
        given: Mapping[str, Any],
        tracer: Tracer,
        function: Callable[..., Any] | None,
        all_steps: bool,
    ) -> None:
        self.count = _count(module, given)
        is_even = not all_steps and _is_even(module, given, self.count)
        is_short = is_even and self.count > PROBED and _is_about_no_step(tracer, function)
        self.run = PROBED if is_short else self.count

    @classmethod
    def of_a_forward(cls) -> Steps:
        """Of one forward pass."""
        found = cls.__new__(cls)
        found.count = found.run = 1
        return found

    def told(self, ledger: Ledger, forwards: Forwards, sites: Sequence[PlannedSite]) -> Told:
        """What is said of all steps."""
        events = _named(ledger)
        at_peak = most_held(events)
        if self.run == self.count:
            return Told(tuple(sites), forwards.kv_cache, at_peak, ())
        line = _Line(self.run, self.count)
        more = tuple(line.site(site) for site in sites)
        kv_cache = line.sizes(dict(enumerate(forwards.kv_cache)))
        last = line.last_step(events, forwards.starts)
        for device, held in last.items():
            if sum(held.values()) > sum(at_peak.get(device, {}).values()):
                at_peak[device] = held
        notes = () if line.is_straight else (_NOT_A_LINE.format(self.run),)
        return Told(more, tuple(kv_cache.values()), at_peak, notes)


@final
class _Line:
    """Goes on from the steps that were run to those that were not."""

    def __init__(self, run: int, count: int) -> None:
        self._run, self._count = run, count
        self.is_straight = True

    def site(self, site: PlannedSite) -> PlannedSite:
        sizes = self.sizes(dict(site.by_step))
        return PlannedSite(site.path, site.slot, site.kept_by, site.device, sizes)

    def sizes(self, by_step: dict[int, int]) -> dict[int, int]:
        """Bytes by step, of all steps; what was there in the prompt alone stays alone."""
        last = [by_step.get(step) for step in range(self._run - 3, self._run)]
        if last[2] is None:
            self.is_straight = self.is_straight and last[0] is last[1] is None
            return by_step
        first, second, third = (size or 0 for size in last)
        self.is_straight = self.is_straight and third - second == second - first
        slope = third - second
        more = {
            step: third + (step - self._run + 1) * slope for step in range(self._run, self._count)
        }
        return {**by_step, **more}

    def last_step(
        self, events: Sequence[tuple[str, str, int]], starts: Sequence[int]
    ) -> dict[str, Held]:
        """What the devices hold in the last step, when each holds most."""
        if len(starts) != self._run:
            self.is_straight = False
            return {}
        held = self._held(events, starts)
        before, after = (
            events[starts[step] : starts[step + 1]] for step in (self._run - 3, self._run - 2)
        )
        if [event[:2] for event in before] != [event[:2] for event in after]:
            self.is_straight = False
            return most_held(after, held)
        steps = self._count - 1 - (self._run - 2)
        grown = [
            (device, label, size + steps * (size - was))
            for (_, _, was), (device, label, size) in zip(before, after, strict=True)
        ]
        return most_held(grown, held)

    def _held(
        self, events: Sequence[tuple[str, str, int]], starts: Sequence[int]
    ) -> dict[str, Held]:
        """What is held when the last step begins: sums of lines, so of second degree."""
        three = [_balance(events[: starts[step]]) for step in range(self._run - 3, self._run)]
        steps = self._count - 1 - (self._run - 3)
        found: dict[str, Held] = {}
        for key in {key for each in three for key in each}:
            first, second, third = (each.get(key, 0) for each in three)
            rise, bend = second - first, third - 2 * second + first
            size = first + steps * rise + steps * (steps - 1) // 2 * bend
            found.setdefault(key[0], {})[key[1]] = size
        return found


def _named(ledger: Ledger) -> list[tuple[str, str, int]]:
    accounts = ledger.accounts
    return [
        (accounts[event.key].device, accounts[event.key].label, event.size)
        for event in ledger.events
    ]


def _balance(events: Sequence[tuple[str, str, int]]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for device, label, size in events:
        found[device, label] = found.get((device, label), 0) + size
    return found


# -- how many ------------------------------------------------------------------------------------


def _count(module: Any, given: Mapping[str, Any]) -> int:
    """How many steps the generation has, if no row ends early."""
    if given.get("max_new_tokens") is not None:
        return int(given["max_new_tokens"])
    return max(1, int(given["max_length"]) - _prompt(module, given))


def _prompt(module: Any, given: Mapping[str, Any]) -> int:
    if getattr(module.config, "is_encoder_decoder", False):
        found = given.get("decoder_input_ids")
        return found.shape[1] if isinstance(found, Tensor) else 1
    for name in ("input_ids", "inputs", "inputs_embeds"):
        found = given.get(name)
        if isinstance(found, Tensor) and found.dim() > 1:
            return found.shape[1]
    return 1


def _is_even(module: Any, given: Mapping[str, Any], count: int) -> bool:
    """Whether each step adds one position to what there is."""
    if any(asked(module, dict(given), name) for name in _UNEVEN):
        return False
    if (asked(module, dict(given), "num_beams") or 1) > 1:
        return False
    length = _prompt(module, given) + count
    config = getattr(module, "config", None)
    configs = [config, *(getattr(config, name, None) for name in ("text_config", "decoder"))]
    found = [getattr(each, name, None) for each in configs for name in _WINDOWS]
    return not any(isinstance(size, int) and size < length for size in found)


def _is_about_no_step(tracer: Tracer, function: Callable[..., Any] | None) -> bool:
    """Whether a block asks for nothing, or for values of the prompt alone; if that is certain."""
    if function is not None:
        return _names_no_step(*_source_of(function))
    block = tracer._block  # pyright: ignore[reportPrivateUsage] - a Planner is part of its tracer
    if block is None:
        return False
    return asks_for_nothing(block) or _names_no_step(block.tree, block.target)


def _names_no_step(tree: ast.AST | None, tracer: str | None) -> bool:
    """Whether the tracer is only asked for what is not of single steps, and handed to nobody."""
    if tree is None:
        return False
    asked_of = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == tracer and node.attr in _OF_STEPS:
                return False
            asked_of += node.value.id == tracer
    named = sum(isinstance(node, ast.Name) and node.id == tracer for node in ast.walk(tree))
    return named == asked_of


def _source_of(function: Callable[..., Any]) -> tuple[ast.AST | None, str | None]:
    """The tree of a function, and the name of the tracer in it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        names = list(inspect.signature(function).parameters)
    except (OSError, TypeError, ValueError, SyntaxError):
        return None, None
    return tree, names[0] if names else None
