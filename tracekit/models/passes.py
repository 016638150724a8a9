"""Notice each forward of a generation: over which tokens it goes, and what they are in the end."""

# Guarantees:
#   - a forward counts if the decoding loop made it, for the sequences themselves: drafts (of an
#     early exit), the other branch of guidance, and models inside the model are told apart;
#   - nothing of the model's keys and values is kept, nor changed.

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracekit.core.quirks import (
    asks_criteria_about_drafts,
    hides_the_chunks_of_a_prompt,
    part_that_generates,
)
from tracekit.core.tree import Tree
from tracekit.interleave.hooks import is_elsewhere
from tracekit.interleave.worker import this_thread
from tracekit.models.recompute import up_to_end, valid_tokens
from tracekit.models.signatures import (
    accepts,
    by_name_of_forward,
    is_transformers,
    owner_of_generate,
)
from tracekit.models.stops import Stops
from tracekit.tracing.timeline import NO_TOKEN, Timeline, Transcript

_KV_CACHES: Final = ("past_key_values", "cache_params")
_LOOP: Final = str(Path(__file__).with_name("generation.py"))  # nobody calls it but us
_DRAFTING: Final = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
# Who calls the model from these files does it for other tokens (transformers 4.57 to 5.23).
_SIDE_BRANCHES: Final = ("logits_process.py", "candidate_generator.py")


@final
class Passes:
    """Writes a generation of the model of `tree` into `timeline`, as long as it is entered."""

    def __init__(
        self, tree: Tree, timeline: Timeline, given: dict[str, Any], stops: Stops | None
    ) -> None:
        self._stops = stops  # told by the user's own criteria, if there are any
        self._root: Any = tree.root
        self._is_plain = owner_of_generate(tree.root) == "GenerationMixin"  # none of its own
        self._timeline = timeline
        self._given = given
        self._thread = this_thread()
        self._step = 0
        self._depth = 0
        self._is_finished = False
        self._rows = 0  # of the first forward
        self._ids: Tensor | None = None  # at the end of the last step
        self._embedded = 0  # columns of the prompt that these have not: given as embeddings
        self._generating: Any = None  # what the decoding loop calls
        self._modules = [each for each in tree.modules.values() if is_transformers(each)]
        self._called_within: dict[Any, Any] = {}  # in the place of a model whose hooks are passed
        if asked(self._root, given, "prefill_chunk_size") and hides_the_chunks_of_a_prompt():
            self._called_within = {
                part: each for each in self._modules for part in (each.base_model, _decoder(each))
            }
        self._has_drafts = any(asked(self._root, given, option) for option in _DRAFTING)
        self._handles: list[RemovableHandle] = []
        timeline.is_generation = True
        timeline.prompt, timeline.prompt_mask = self._known_prompt()

    def __enter__(self) -> Passes:
        for module in {*self._modules, *self._called_within}:
            begin: Any = self._begin
            before = module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            self._handles += [before, module.register_forward_hook(self._end, always_call=True)]
        self._timeline.tell = self._so_far
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._is_finished:
            self._timeline.transcript = self._so_far()
        self._timeline.tell = None
        self._given, self._root, self._generating = {}, None, None

    def _so_far(self) -> Transcript | None:
        """The tokens at the end of the last step, or the prompt; None while there are beams."""
        if self._generating is None or self._has_beams:
            return None
        if self._ids is not None:
            return self._transcript(self._with_prompt(self._ids))
        prompt = self._given_ids() if self._is_plain else None
        if prompt is None or is_encoder_decoder(self._root):
            return None
        return self._transcript(prompt.repeat_interleave(self._rows // len(prompt), 0))

    def is_about_a_draft(self) -> bool:
        """Whether a stopping criterion is asked before the model has run in this step."""
        last = self._timeline.current
        has_run = last is not None and last.is_main and last.step == self._step
        return self._has_drafts and not has_run and asks_criteria_about_drafts()

    def end_step(self, ids: Tensor) -> None:
        """A step has ended, with these sequences: `[rows, length]`, without what was embedded."""
        self._step += 1
        self._ids = ids
        if self._step == 1 and ids.shape[1] <= self._prompt():
            self._embedded = self._prompt()
        self._timeline.end_step(self._embedded + ids.shape[1])

    def finish(self, result: Any) -> None:
        """Generate has returned `result`, a dictionary where there are beams."""
        if self._has_beams and getattr(result, "beam_indices", None) is not None:
            tokens = self._with_prompt(result.sequences)
            self._timeline.transcript = self._transcript(tokens, result.beam_indices)
            self._is_finished = True

    @property
    def _has_beams(self) -> bool:
        return has_beams(self._root, self._given)

    # -- the hooks ------------------------------------------------------------------------------

    def _begin(self, module: Any, args: Any, kwargs: Any = None) -> None:
        if is_elsewhere(self._thread):
            return
        self._depth += 1
        if self._depth > 1:
            return
        given = by_name_of_forward(module, args, kwargs or {})
        module = self._called_within.get(module, module)
        size = _size(module, given)
        if size is None:
            return
        rows, length = size
        if self._generating is None:
            self._generating, self._rows = module, rows
            self._note_padding(length)
        kept = given.get("logits_to_keep")
        if self._called_within and accepts(module, "logits_to_keep"):
            kept = 1  # generate asks the model itself for no more
        is_main = not _is_side_branch() and module is self._generating
        start = self._start(given, length)
        kept = kept if isinstance(kept, int) else 0
        self._timeline.begin(self._step, rows, start, length, kept, is_main)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):
            self._depth -= 1

    def _start(self, given: dict[str, Any], length: int) -> int:
        columns = given.get("cache_position")  # before 5, where a kv_cache may count wrongly
        if isinstance(columns, Tensor) and columns.shape == (length,):
            return int(columns[0])
        known = self._known_columns()
        for name in _KV_CACHES:
            measured = _measured(given.get(name))
            # a kv_cache is as long as its first layer, which a block may have skipped
            if measured is not None and measured + length >= known:
                return measured
        if self._step == 0:  # nothing kept, or what has no length: one chunk after the other
            return known
        return 0 if length >= known else known - length

    def _known_columns(self) -> int:
        """How many columns the sequences have by now: in the first step, those that were run."""
        if self._step:
            return self._timeline.lengths[self._step - 1]
        return max((each.stop for each in self._timeline.passes if each.is_main), default=0)

    def _note_padding(self, length: int) -> None:
        """In a `generate` of its own the prompt may be another; if it is as long, its mask is."""
        mask = self._given.get("attention_mask")
        if self._is_plain or is_encoder_decoder(self._root):
            return
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length:
            self._timeline.prompt_mask = None if bool(mask.all()) else mask.bool().cpu()

    # -- the tokens -----------------------------------------------------------------------------

    def _known_prompt(self) -> tuple[int | None, Tensor | None]:
        """How many columns the prompt has, and which of them are tokens, where that is plain."""
        given = self._given
        if not self._is_plain or is_encoder_decoder(self._root):
            mask = given.get("decoder_attention_mask")
            return None, None if mask is None else mask.cpu()
        ids = self._given_ids()
        if ids is not None:
            mask = given.get("attention_mask")
            if not isinstance(mask, Tensor) or mask.shape != ids.shape:  # transformers makes one
                none = ids.new_zeros(ids.shape[0])
                mask = valid_tokens(self._root, given, ids, new_tokens=none)
            return ids.shape[1], None if bool(mask.all()) else mask.bool().cpu()
        embeds: Any = given.get("inputs_embeds")
        mask = given.get("attention_mask")
        has_padding = mask is not None and not bool(mask.all())
        length = None if embeds is None else embeds.shape[1]
        return length, mask.cpu() if has_padding and mask is not None else None

    def _given_ids(self) -> Tensor | None:
        ids: Any = self._given.get("input_ids")
        ids = self._given.get("inputs") if ids is None else ids
        is_plain = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        return ids if is_plain and ids.shape[1] else None

    def _prompt(self) -> int:
        """How many columns came before the first new token."""
        if self._timeline.prompt is not None:
            return self._timeline.prompt
        passes = self._timeline.passes
        return max((each.stop for each in passes if each.is_main and each.step == 0), default=0)

    def _with_prompt(self, ids: Tensor) -> Tensor:
        embedded = self._embedded
        is_longer = self._ids is not None and ids.shape[1] > self._ids.shape[1]
        if not embedded or is_longer:  # a `generate` of its own may have put it in front
            return ids
        known = self._given_ids()
        if known is None or known.shape[1] != embedded:
            known = ids.new_full((ids.shape[0], embedded), NO_TOKEN)
        return torch.cat([known.repeat_interleave(ids.shape[0] // known.shape[0], 0), ids], 1)

    def _transcript(self, tokens: Tensor, beams: Tensor | None = None) -> Transcript:
        tokens = tokens.to("cpu", copy=True)
        prompt = self._prompt()
        is_real = torch.ones_like(tokens, dtype=torch.bool)
        mask = self._timeline.prompt_mask
        if mask is not None:
            wide = mask[:, : tokens.shape[1]].bool()
            is_real[:, : wide.shape[1]] = wide.repeat_interleave(len(tokens) // len(wide), 0)
        new = tokens[:, prompt:]
        is_real[:, prompt:] = self._is_own(new, prompt)
        if beams is None:
            return Transcript(tokens, is_real, prompt)
        lineage = _lineage(beams.cpu(), prompt, tokens.shape[1])
        assert self._ids is not None
        return Transcript(tokens, is_real, prompt, lineage, self._rows)

    def _is_own(self, new: Tensor, prompt: int) -> Tensor:
        """Which of the new tokens are up to the end of their row."""
        count = up_to_end(new, _ends(self._root, self._given))
        if self._stops is not None and not self._has_beams:
            count = self._stops.new_tokens(prompt, count)
        return torch.arange(new.shape[1]) < count[:, None]


def tell_forward(module: Any, timeline: Timeline, given: dict[str, Any]) -> None:
    """Write one forward of a decoder or an encoder into `timeline`.

    All of it is prompt, unless `timeline` was told how much.

    An encoder-decoder has positions of two kinds in one forward: of it nothing is told.
    """
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", True):
        return
    size = _size(module, given)
    if size is None:
        return
    measured = (_measured(given.get(name)) for name in _KV_CACHES)
    before = next((length for length in measured if length), 0)
    rows, length = size
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    is_plain = isinstance(mask, Tensor) and mask.shape == (rows, before + length)
    timeline.prompt = before + length if timeline.prompt is None else timeline.prompt
    timeline.prompt_mask = mask.bool().cpu() if is_plain and mask is not None else None
    tokens = torch.full((rows, before + length), NO_TOKEN)
    if isinstance(ids, Tensor):
        tokens[:, before:] = ids
    is_real = timeline.prompt_mask
    is_real = torch.ones_like(tokens, dtype=torch.bool) if is_real is None else is_real
    timeline.transcript = Transcript(tokens, is_real, timeline.prompt)
    kept = given.get("logits_to_keep")
    timeline.begin(0, rows, before, length, kept if isinstance(kept, int) else 0)


def asked(module: Any, given: dict[str, Any], name: str) -> Any:
    """What a generation goes by: what is given, over a given configuration, over the module's.

    As generation_settings has it, without what that costs.
    """
    if name in given:
        return given[name]
    inner = part_that_generates(module)
    for config in (given.get("generation_config"), getattr(inner, "generation_config", None)):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return None


def has_beams(module: Any, given: dict[str, Any]) -> bool:
    """Whether sequences are made of beams."""
    return (asked(module, given, "num_beams") or 1) > 1


def _ends(module: Any, given: dict[str, Any]) -> list[int]:
    """The end-of-sequence tokens."""
    ends = asked(module, given, "eos_token_id")
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def is_encoder_decoder(module: Any) -> bool:
    """Whether what it generates is read by a decoder, behind an encoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _decoder(module: Any) -> Any:
    """The part that is called in every forward, also where the model in between is passed by."""
    return module.get_decoder() if hasattr(module, "get_decoder") else module.base_model


def _size(module: Any, given: dict[str, Any]) -> tuple[int, int] | None:
    """How many rows and positions a forward has."""
    names = ["input_ids", "inputs_embeds"]
    if is_encoder_decoder(module):
        names = ["decoder_input_ids", "decoder_inputs_embeds"]
    for name in names:
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > 1:
            return tensor.shape[0], tensor.shape[1]
    return None


def _measured(kv_cache: Any) -> int | None:
    """How many positions keys and values are kept of; None for states that have no length."""
    length = getattr(kv_cache, "get_seq_length", None)
    if length is None:
        return None
    try:
        return int(length())
    except (ValueError, TypeError, AttributeError, IndexError):  # linear attention alone
        return None


def _is_side_branch() -> bool:
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage] - for the speed
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith(_SIDE_BRANCHES):
            return True
        if name == _LOOP:
            return False
        frame = frame.f_back
    return False


def _lineage(beams: Tensor, prompt: int, length: int) -> Tensor:
    """`[rows, length]`: the row of the batch in which each position of a sequence was computed.

    NO_TOKEN where a sequence had ended. `beams`: `[rows, steps]`, as transformers returns it.
    """
    found = torch.full((beams.shape[0], length), NO_TOKEN)
    found[:, : prompt - 1] = beams[:, :1]
    steps = min(beams.shape[1], length - prompt + 1)
    found[:, prompt - 1 : prompt - 1 + steps] = beams[:, :steps]
    return found
