"""The same work as each library does it; all traces stand in functions, as in a user's script."""

# What is compared is the same work: agree() checks, before anything is timed, that everybody kept
# the tensors that hand-written hooks keep.

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from subjects import Subject
from torch import Tensor, nn

from tracekit import LanguageModel, Model

NEW_TOKENS = 32


class Work(Enum):
    """What is timed."""

    FORWARD = "forward, outside a trace"
    EMPTY = "empty trace"
    READ = "1 live read"
    READS = "12 live reads"
    STORED = "12 stored reads"
    MANY_STORED = "48 stored reads"
    CACHE_12 = "cache(12 modules)"
    CACHE_ALL = "cache()"
    GENERATE = "generate, outside a trace"
    GENERATE_EMPTY = "generate, empty trace"
    GENERATE_CACHE = "generate, cache(every layer)"


GENERATIONS = frozenset({Work.GENERATE, Work.GENERATE_EMPTY, Work.GENERATE_CACHE})


@dataclass(frozen=True)
class Contender:
    """A way to do the work; `warm` is a plain forward of its module, before each timed run."""

    name: str
    warm: Callable[[], object]
    works: dict[Work, Callable[[], object]]


# -- bare, and plain hooks ------------------------------------------------------------------------


def bare(subject: Subject) -> Contender:
    """The module itself."""
    forward = partial(subject.module, input_ids=subject.ids, use_cache=False)
    generate = partial(_generate, subject.module, subject.ids)
    return Contender("bare", forward, {Work.FORWARD: forward, Work.GENERATE: generate})


def hooks(subject: Subject) -> Contender:
    """Hooks as one writes them by hand: placed, fired and removed for each run."""
    module = subject.module
    called = [(path, part) for path, part in module.named_modules() if _has_forward(part)]
    forward = partial(module, input_ids=subject.ids, use_cache=False)
    generate = partial(_generate, module, subject.ids)
    return Contender(
        "hooks",
        forward,
        {
            Work.CACHE_12: partial(_hooked, _parts(module, subject.places), forward),
            Work.CACHE_ALL: partial(_hooked, called, forward),
            Work.GENERATE_CACHE: partial(_hooked_often, _parts(module, subject.layers), generate),
        },
    )


def _generate(module: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return module.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)


def _parts(module: nn.Module, paths: list[str]) -> list[tuple[str, nn.Module]]:
    return [(path, module.get_submodule(path)) for path in paths]


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _hooked(parts: list[tuple[str, nn.Module]], run: Callable[[], object]) -> dict[str, Any]:
    kept: dict[str, Any] = {}

    def keep_as(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[path] = _detached(output)

        return hook

    handles = [part.register_forward_hook(keep_as(path)) for path, part in parts]
    run()
    for handle in handles:
        handle.remove()
    return kept


def _hooked_often(
    parts: list[tuple[str, nn.Module]], run: Callable[[], object]
) -> dict[str, list[Any]]:
    kept: dict[str, list[Any]] = {path: [] for path, _ in parts}

    def keep_in(outputs: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(_detached(output))

        return hook

    handles = [part.register_forward_hook(keep_in(kept[path])) for path, part in parts]
    run()
    for handle in handles:
        handle.remove()
    return kept


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)([_detached(item) for item in value])
    if isinstance(value, dict):  # a ModelOutput is one
        return {key: _detached(item) for key, item in value.items()}
    return value


# -- tracekit -------------------------------------------------------------------------------------


def tracekit(subject: Subject) -> Contender:
    """A LanguageModel around the very module that runs bare: it changes nothing on it."""
    model = LanguageModel(subject.module, tokenizer=subject.tokenizer)
    ids = subject.ids
    places = [_envoy(model, path) for path in subject.places]
    layers = [_envoy(model, path) for path in subject.layers]
    many = [_envoy(model, path) for path in subject.many_places]
    return Contender(
        "tracekit",
        partial(subject.module, input_ids=ids, use_cache=False),
        {
            Work.FORWARD: partial(model, input_ids=ids, use_cache=False),
            Work.EMPTY: partial(_empty, model, ids),
            Work.READ: partial(_reads, model, ids, places[:1]),
            Work.READS: partial(_reads, model, ids, places),
            Work.STORED: partial(_stored, model, ids, places),
            Work.MANY_STORED: partial(_stored, model, ids, many),
            Work.CACHE_12: partial(_cache, model, ids, places),
            Work.CACHE_ALL: partial(_cache, model, ids, None),
            Work.GENERATE_EMPTY: partial(_generate_empty, model, ids),
            Work.GENERATE_CACHE: partial(_generate_cache, model, ids, layers),
        },
    )


def tracekit_model(subject: Subject) -> Contender:
    """A Model around it, which prepares no text."""
    model = Model(subject.module)
    forward = partial(subject.module, input_ids=subject.ids, use_cache=False)
    return Contender("tracekit.Model", forward, {Work.EMPTY: partial(_empty, model, subject.ids)})


def _envoy(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


# The same functions serve tracekit and nnsight, as the syntax is the same.


def _empty(model: Any, ids: Tensor) -> None:
    with model.trace(ids, use_cache=False):
        pass


def _reads(model: Any, ids: Tensor, places: list[Any]) -> list[Any]:
    values: list[Any] = []
    with model.trace(ids, use_cache=False):
        for place in places:
            value = place.output
            assert value is not None  # it is used, so it has to be here
            values.append(value)
    return values


def _stored(model: Any, ids: Tensor, places: list[Any]) -> list[Any]:
    values: list[Any] = []
    with model.trace(ids, use_cache=False):
        for place in places:
            values.append(place.output)
    return values


def _cache(model: Any, ids: Tensor, places: list[Any] | None) -> Any:
    with model.trace(ids, use_cache=False) as tracer:
        cache = tracer.cache(modules=places)
    return cache  # noqa: RET504 - the name is what the block hands back


def _generate_empty(model: Any, ids: Tensor) -> None:
    with model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False):
        pass


def _generate_cache(model: Any, ids: Tensor, layers: list[Any]) -> Any:
    with model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
        cache = tracer.cache(modules=layers)
    return cache  # noqa: RET504 - the name is what the block hands back


# -- rivals ---------------------------------------------------------------------------------------


def nnsight(subject: Subject) -> Contender:
    """nnsight's model for transformers, around a copy: it replaces every module's forward."""
    from nnsight import TransformersModel

    own = subject.copied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformersModel(own.module, tokenizer=own.tokenizer)
    ids = own.ids
    places = [_envoy(model, path) for path in own.places]
    layers = [_envoy(model, path) for path in own.layers]
    many = [_envoy(model, path) for path in own.many_places]
    forward = partial(own.module, input_ids=ids, use_cache=False)
    return Contender(
        "nnsight",
        forward,
        {
            Work.FORWARD: forward,
            Work.EMPTY: partial(_empty, model, ids),
            Work.READ: partial(_reads, model, ids, places[:1]),
            Work.READS: partial(_reads, model, ids, places),
            Work.STORED: partial(_stored, model, ids, places),
            Work.MANY_STORED: partial(_stored, model, ids, many),
            Work.CACHE_12: partial(_cache, model, ids, places),
            Work.CACHE_ALL: partial(_cache, model, ids, None),
            Work.GENERATE_EMPTY: partial(_generate_empty, model, ids),
            Work.GENERATE_CACHE: partial(_generate_cache, model, ids, layers),
        },
    )


def nnsight_plain(subject: Subject) -> Contender:
    """nnsight's wrapper of any module, which prepares no text."""
    from nnsight import NNsight

    own = subject.copied()
    model = NNsight(own.module)
    forward = partial(own.module, input_ids=own.ids, use_cache=False)
    return Contender("NNsight", forward, {Work.EMPTY: partial(_empty, model, own.ids)})


def transformer_lens(subject: Subject) -> Contender:
    """TransformerLens' bridge around a copy: it replaces the modules with its own, eager ones."""
    from transformer_lens.model_bridge import TransformerBridge

    own = subject.copied()
    own.module.config.architectures = ["GPT2LMHeadModel"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformerBridge.boot_transformers(
            "gpt2", hf_model=own.module, tokenizer=own.tokenizer, device="cpu"
        )
    layers = len(own.layers)
    names = {f"blocks.{index}.hook_out" for index in range(layers)}
    if layers < len(own.places):
        parts = ("ln1.hook_out", "attn.hook_out", "mlp.hook_out")
        names = {f"blocks.{index}.{part}" for index in range(layers) for part in parts}
    forward = partial(model, own.ids)
    return Contender(
        "TransformerLens",
        forward,
        {
            Work.FORWARD: forward,
            Work.CACHE_12: partial(model.run_with_cache, own.ids, names_filter=names.__contains__),
            Work.CACHE_ALL: partial(model.run_with_cache, own.ids),
            Work.GENERATE: partial(
                model.generate,
                own.ids,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
            ),
        },
    )


RIVALS = (
    ("nnsight", (nnsight, nnsight_plain)),
    ("transformer_lens", (transformer_lens,)),
)


def contenders(subject: Subject) -> tuple[list[Contender], list[str]]:
    """Everybody who can take part, and a word on each who cannot."""
    present = [make(subject) for make in (bare, hooks, tracekit, tracekit_model)]
    absent: list[str] = []
    for package, makers in RIVALS:
        try:
            importlib.import_module(package)
        except ImportError as error:
            absent.append(f"{package} is left out: {error}")
            continue
        present += [make(subject) for make in makers]
    return present, absent


# -- the same work? -------------------------------------------------------------------------------


def agree(subject: Subject, everybody: list[Contender]) -> None:
    """Check that tracekit and nnsight keep what the hooks keep; AssertionError if one does not."""
    works = {contender.name: contender.works for contender in everybody}
    by_hand = works["hooks"]
    for name in ("tracekit", "nnsight"):
        if name not in works:
            continue
        for work in (Work.READS, Work.STORED):
            read = works[name][work]()
            _check(name, work, read, list(by_hand[Work.CACHE_12]().values()))
        for work in (Work.CACHE_12, Work.CACHE_ALL, Work.GENERATE_CACHE):
            kept, expected = works[name][work](), by_hand[work]()
            for path, value in expected.items():
                entries = kept[f"model.{path}" if path else "model"]
                found = entries.outputs if name == "tracekit" else _outputs(entries)
                outputs = value if work is Work.GENERATE_CACHE else [value]
                _check(f"{name}, {path}", work, found, outputs)


def _outputs(entries: Any) -> list[Any]:
    output = entries.output  # nnsight: a value, or a list of them where there were several visits
    return output if isinstance(output, list) else [output]


def _check(who: str, work: Work, found: Any, expected: Any) -> None:
    same = len(_tensors(found)) == len(_tensors(expected)) and all(
        torch.allclose(one, other, atol=1e-5)
        for one, other in zip(_tensors(found), _tensors(expected), strict=True)
    )
    assert same, f"{who}: {work.value} does not hold what hooks hold"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return []
    return [tensor for item in items for tensor in _tensors(item)]
