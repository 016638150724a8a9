"""What `generate` hands back: tokens or text, the tokens of the prompt, a cache of all of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from tracekit.core.quirks import takes_off_the_start
from tracekit.core.tree import Tree
from tracekit.errors import InputError
from tracekit.models.recompute import (
    count_new_tokens,
    end_tokens,
    forward_inputs,
    is_beam_search,
    prompt_length,
)
from tracekit.models.stops import Stops, watching
from tracekit.tracing.call import Follower
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.select import Selector, select

_KINDS: Final = ("tokens", "str", "input")


@final
@dataclass(frozen=True)
class Wanted:
    """What is to be handed back."""

    kind: str = "tokens"
    cache: bool = False
    input_tokens: bool = False
    modules: Any = None
    device: torch.device | str | None = "cpu"

    @property
    def is_plain(self) -> bool:
        """Whether it is what transformers returns."""
        return self == Wanted()


def wanted_of(options: dict[str, Any]) -> tuple[Wanted, dict[str, Any]]:
    """What the options ask for, and the options that are left."""
    rest = dict(options)
    kind = rest.pop("return_type", None) or "tokens"
    if kind not in _KINDS:
        raise InputError(f"return_type= is 'tokens', 'str' or 'input', not {kind!r}.")
    has_cache = bool(rest.pop("return_cache", False))
    alone = [name for name in ("names_filter", "device") if name in rest and not has_cache]
    if alone:
        raise InputError(f"{alone[0]}= is about the cache: give return_cache=True, too.")
    with_tokens = bool(rest.pop("return_input_tokens", False))
    modules, device = rest.pop("names_filter", None), rest.pop("device", "cpu")
    return Wanted(kind, has_cache, with_tokens, _of_paths(modules), device), rest


def _of_paths(names: Any) -> Any:
    """`names` as a selector: a predicate may take the name alone."""
    if names is None or isinstance(names, (str, Envoy)):
        return names
    if callable(names):
        return _of_path_and_module(cast("Callable[..., bool]", names))
    if isinstance(names, Iterable):
        return [_of_paths(each) for each in cast("Iterable[Any]", names)]
    return names  # tracer.cache says what is wrong with it


def _of_path_and_module(predicate: Callable[..., bool]) -> Callable[[str, Any], bool]:
    try:
        inspect.signature(predicate).bind("", None)
    except TypeError:
        return lambda path, module: bool(predicate(path))
    except ValueError:  # a builtin without a signature
        return lambda path, module: bool(predicate(path))
    return predicate


@final
class Returning:
    """One generation, and what is made of its output."""

    def __init__(
        self, wanted: Wanted, tree: Tree, tokenizer: Any, source: Any, given: dict[str, Any]
    ) -> None:
        self._wanted = wanted
        self._module: Any = tree.root
        self._tokenizer = tokenizer
        self._is_text = _is_text(source)
        self._is_one_text = isinstance(source, str)
        self._given = given
        self._stops: Stops | None = None
        self._prompt: int | None = None  # columns of the pass
        self._check(tree)

    def _check(self, tree: Tree) -> None:
        """Raise before the generation for what would fail behind it."""
        wanted = self._wanted
        if wanted.kind == "str" and self._tokenizer is None:
            raise InputError(
                "return_type='str' needs a tokenizer: LanguageModel(module, tokenizer=...)."
            )
        if wanted.kind == "str" and self._given.get("return_dict_in_generate"):
            raise InputError(
                "return_type='str' is text, and output_logits= or return_dict_in_generate= a "
                "dictionary: leave one out; model.tokenizer.batch_decode(output.sequences) is text."
            )
        if wanted.input_tokens and self._given.get("input_ids") is None:
            raise InputError("return_input_tokens=True: no tokens were given.")
        if wanted.cache and wanted.modules is not None:
            select(tree, cast("Selector", wanted.modules))

    def arguments(self) -> dict[str, Any]:
        """Those of the module's own `generate`."""
        if not self._wanted.cache:
            return self._given
        self._stops, criteria = watching(self._module, self._given)
        return {**self._given, "stopping_criteria": criteria}

    def of_pass(self, output: Any) -> dict[str, Any] | None:
        """The inputs of one forward pass over the prompt and what was generated, for a cache."""
        if self._stops is None:
            return None
        module, given = self._module, self._given
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        if takes_off_the_start(module):
            is_whole = not isinstance(output, Tensor) and type(output) is not dict
            sequences = sequences if is_whole else self._with_start(sequences)
        count = count_new_tokens(module, given, sequences)
        if end_tokens(module, given) and not is_beam_search(module, given):
            count = self._stops.new_tokens(prompt_length(module, given, sequences), count)
        if given.get("inputs_embeds") is None:
            self._prompt = prompt_length(module, given, sequences)
        else:
            self._prompt = given["inputs_embeds"].shape[1]
        return forward_inputs(module, given, sequences, new_tokens=count)

    def told(self, follower: Follower | None) -> Follower | None:
        """`follower`, that knows where the prompt ends in that pass: edits of tokens ask for it."""
        if follower is not None:
            follower.timeline.prompt = self._prompt
        return follower

    def _with_start(self, sequences: Tensor) -> Tensor:
        assert self._stops is not None
        if is_beam_search(self._module, self._given):
            return self._stops.behind_start(sequences)
        return self._stops.only_run()

    def record(self, tracer: Any) -> Any:
        """The block of that pass."""
        return tracer.cache(self._wanted.modules, device=self._wanted.device)

    def handed_back(self, output: Any, cache: Any) -> Any:
        """The output as it was asked for, and behind it the cache, and the tokens of the prompt."""
        wanted = self._wanted
        found = [self._as_asked(output)]
        if wanted.cache:
            found.append(cache)
        if wanted.input_tokens:
            found.append(self._given["input_ids"])
        return tuple(found) if len(found) > 1 else found[0]

    def _as_asked(self, output: Any) -> Any:
        kind = self._wanted.kind
        is_text = kind == "str" or (kind == "input" and self._is_text)
        if not is_text or not isinstance(output, Tensor):
            return output
        texts = [_text(self._tokenizer, row) for row in output]
        return texts[0] if self._is_one_text and len(texts) == 1 else texts


def _is_text(source: Any) -> bool:
    if isinstance(source, (list, tuple)):
        return all(isinstance(each, str) for each in cast("list[Any]", source))
    return isinstance(source, str)


def _text(tokenizer: Any, row: Tensor) -> str:
    return tokenizer.decode(row[row >= 0], skip_special_tokens=True)
