"""The way round the first layers of a model, proved on a few tokens."""

# The residual is given as `inputs_embeds` are, so masks and positions are made for as many tokens;
# what embeds and the layers before do nothing, and the layer is called with the residual. Not
# all models are right so: some hand on more than the residual stream (T5 its position bias, of the
# first layer). So each is asked once for each layer.

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from tracekit.architectures import Bound
from tracekit.architectures.layouts import Whole
from tracekit.core.detour import Call, Value, detour, embedding, entering, giving, passing
from tracekit.core.nest import first_tensor
from tracekit.core.offload import device_of, is_accelerates
from tracekit.core.site import Slot
from tracekit.core.tree import Tree
from tracekit.interleave.forwards import own_forward
from tracekit.models.behind import behind, run_behind
from tracekit.models.generation import forward
from tracekit.models.passes import is_encoder_decoder
from tracekit.models.prefix import Prefix, empty_mask
from tracekit.models.probing import deviation, tolerance
from tracekit.models.signatures import accepts
from tracekit.tracing.named import tensor_of
from tracekit.tracing.rehearsal import as_if_nothing_ran, real_twin

TOKENS: Final = 6  # of the proof
LOWEST_ID: Final = 10  # most special tokens lie below, or at the end of the vocabulary
# How far off an accelerator may be, where sums come in any order; the CPU gives the same bits.
TOLERANCE: Final = 0.01


@final
@dataclass(frozen=True)
class Route:
    """What a run in front of a layer goes round, by path."""

    number: int
    skipped: dict[str, int]  # layers, and of how many values each returns a tuple (0: a tensor)
    embeds: tuple[str, ...]
    layer: str | None  # None: behind the last

    def of(self, tree: Tree, residual: Value) -> Tree:
        """The model that goes this way, with that residual stream."""
        calls: dict[str, Call] = {path: embedding(residual) for path in self.embeds}
        for path, size in self.skipped.items():
            calls[path] = passing(size)
        gone = tuple(calls)
        if self.layer is not None:
            calls[self.layer] = entering(residual)
        else:
            last, size = list(self.skipped.items())[-1]
            calls[last] = giving(residual, size)
        return detour(tree, calls, gone)


def route_of(tree: Tree, number: int, kwargs: dict[str, Any]) -> Route | str:
    """The way round what is before a layer, proved on a few tokens; or why there is none."""
    proof = _proof(tree, number, kwargs)
    if isinstance(proof, str):
        return proof
    with as_if_nothing_ran(tree):
        return proof.route()


def routes_of(
    model: Any, tree: Tree, number: int, kwargs: dict[str, Any], route: Route | None
) -> tuple[Route | str, str]:
    """The same, if `route` does not say it; and why it is wrong behind keys and values, or ""."""
    proof = _proof(tree, number, kwargs)
    if isinstance(proof, str):
        return proof, ""
    with as_if_nothing_ran(tree):
        found = route or proof.route()
        return found, "" if isinstance(found, str) else proof.why_not_behind(model, found)


def _proof(tree: Tree, number: int, kwargs: dict[str, Any]) -> _Proof | str:
    """What a way round the layers before one is proved with, or why there is none."""
    paths = _layers(tree)
    if len(set(paths)) < len(paths):
        return "its layers are the same modules, called several times"
    is_last = number == len(paths)
    names, layer = tree.names, paths[-1] if is_last else paths[number]
    assert names is not None
    bound = names.point(tree.below(layer), "resid_post" if is_last else "resid_pre")
    if bound is None or bound.layout != Whole():
        return "the layer is not given it as it is"
    twin = real_twin(tree)
    twin.root.eval()
    return _Proof(twin, paths, number, bound, kwargs)


def _layers(tree: Tree) -> list[str]:
    assert tree.names is not None
    paths = [f"{tree.name}.{path}" for path, *_ in tree.names.stacks["layers"]]
    return [tree.aliases.get(path, path) for path in paths]


def why_closed(tree: Tree, number: int) -> str:
    """Why modules on the way can't be copied: what runs them would run the model's own."""
    paths = _layers(tree)
    for path in (*tree.ancestors(paths[0]), *paths[number : number + 1]):
        module = tree.modules[path]
        plain = MethodType(type(module).forward, module)
        is_plain = "_old_forward" not in vars(module) or is_accelerates(module)
        if not is_plain or own_forward(module) != plain:
            return f"something is put around the forward of {path}"
    return ""


@final
class _Proof:
    """A whole run of a twin, and whether one that begins in front of a layer gives the same."""

    def __init__(
        self, twin: Tree, paths: list[str], number: int, bound: Bound, kwargs: dict[str, Any]
    ) -> None:
        self._twin = twin
        self._bound = bound
        self._number = number
        self._paths = paths
        self._is_both = is_encoder_decoder(twin.root)
        names = ("encoder_outputs", "attention_mask") if self._is_both else ()
        self._given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if accepts(twin.root, "use_cache"):
            self._given["use_cache"] = False
        self._device = device_of(twin.root)
        self._order: list[str] = []  # of the modules that were called
        self._returned: dict[str, Any] = {}
        self._residual: Tensor | None = None
        self._known: Tensor | None = None  # what the whole run gave

    def route(self) -> Route | str:
        try:
            whole = self._whole()
        except Exception as error:  # noqa: BLE001 - as it may in any way
            return f"it does not run on tokens alone ({type(error).__name__}: {error})"
        if self._residual is None:
            return "its layers are not called with a residual stream"
        skipped = {path: _size(self._returned.get(path)) for path in self._paths[: self._number]}
        layer = self._paths[self._number] if self._number < len(self._paths) else None
        route = Route(self._number, skipped, self._embedding(), layer)
        tries = [route, replace(route, embeds=self._named())]
        why = ""
        for each in dict.fromkeys(one.embeds for one in tries):
            found = replace(route, embeds=each)
            why = self._why_not(found, whole)
            if not why:
                return found
        return why

    def why_not_behind(self, model: Any, route: Route) -> str:
        """What is wrong with a route behind the first tokens; "" if nothing is."""
        ids, half = self._ids(), TOKENS // 2
        try:
            whole = self._whole()[:, half:]
            outputs = forward(self._twin, None, (), {"input_ids": ids[:, :half], "use_cache": True})
            first = Prefix(model, outputs.past_key_values, ids[:, :half], empty_mask(ids[:, :half]))
            assert self._residual is not None
            residual = self._residual[:, half:].contiguous()
            rest = behind(model, first, {"inputs_embeds": torch.zeros_like(residual)}, False)
            outputs = run_behind(route.of(self._twin, lambda: residual), None, (), rest)
            found = _logits(outputs)
        except Exception as error:  # noqa: BLE001 - as it may in any way
            return f"it does not go on behind keys and values ({type(error).__name__}: {error})"
        if deviation(found, whole) > tolerance(whole):
            return "behind keys and values it gives something else than in the whole text"
        return ""

    def _whole(self) -> Tensor:
        """The outputs for tokens; what is called on the way, and the residual stream."""
        if self._known is not None:
            return self._known
        handles: list[Any] = []
        for path, module in self._twin.called.items():
            handles += self._watched(path, module)
        name = "decoder_input_ids" if self._is_both else "input_ids"
        outputs = self._outputs(self._twin, {name: self._ids()})
        for handle in handles:
            handle.remove()
        self._known = outputs
        return outputs

    def _watched(self, path: str, module: nn.Module) -> list[Any]:
        is_site = path == f"{self._twin.name}.{self._bound.path}"

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._order.append(path)
            if is_site and self._bound.slot is Slot.INPUT:
                self._see((args, kwargs))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if path in self._paths:
                self._returned[path] = output
            if is_site and self._bound.slot is Slot.OUTPUT:
                self._see(output)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _see(self, value: Any) -> None:
        found = tensor_of(self._bound, value)
        self._residual = found.clone() if found.dim() == 3 else None

    def _ids(self) -> Tensor:
        source = first_tensor(self._given.get("encoder_outputs"))
        rows = 2 if source is None else len(source)
        ids = torch.arange(LOWEST_ID, LOWEST_ID + rows * TOKENS, device=self._device)
        return ids.reshape(rows, TOKENS) % (self._vocabulary() - 1)

    def _vocabulary(self) -> int:
        root: Any = self._twin.root
        return root.get_input_embeddings().num_embeddings

    def _outputs(self, tree: Tree, inputs: dict[str, Any]) -> Tensor:
        return _logits(forward(tree, None, (), {**inputs, **self._given}))

    def _embedding(self) -> tuple[str, ...]:
        """What has weights, and was called before the first layer alone."""
        first = self._order.index(self._paths[0])
        later = set(self._order[first:])
        around = {above for path in self._paths for above in self._twin.ancestors(path)}
        return tuple(
            path
            for path in dict.fromkeys(self._order[:first])
            if path not in later
            and path not in around
            and any(True for _ in self._twin.modules[path].parameters(recurse=False))
        )

    def _named(self) -> tuple[str, ...]:
        """What is known to embed, by its standard name."""
        names = self._twin.names
        assert names is not None
        words = (names.module("", word) for word in ("embed", "pos_embed"))
        paths = [f"{self._twin.name}.{path}" for path in words if path is not None]
        return tuple(path for path in paths if path in self._twin.called)

    def _why_not(self, route: Route, whole: Tensor) -> str:
        """What is wrong with a route; "" if nothing is."""
        assert self._residual is not None
        called: list[str] = []
        around = [
            module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
            for path in (*route.skipped, *route.embeds)
            for module in self._twin.modules[path].modules()
        ]
        name = "decoder_inputs_embeds" if self._is_both else "inputs_embeds"
        residual = self._residual
        try:
            zeros = torch.zeros_like(residual)
            found = self._outputs(route.of(self._twin, lambda: residual), {name: zeros})
        except Exception as error:  # noqa: BLE001 - a model may fail in any way without its layers
            return f"it fails without what is before ({type(error).__name__}: {error})"
        finally:
            for handle in around:
                handle.remove()
        if called:
            return f"{called[0]} is called nevertheless"
        if not _is_same(found, whole):
            return (
                "it gives something else than on tokens, as more than the residual stream comes "
                "from the layers or embeddings before"
            )
        return ""


def _logits(outputs: Any) -> Tensor:
    """The logits, or what comes first where there are none."""
    found = getattr(outputs, "logits", None)
    found = first_tensor(outputs) if found is None else found
    assert isinstance(found, Tensor)
    return found


def _is_same(found: Tensor, whole: Tensor) -> bool:
    if torch.equal(found, whole) or whole.device.type == "cpu":
        return torch.equal(found, whole)
    return float((found.float() - whole.float()).norm() / whole.float().norm()) <= TOLERANCE


def _size(returned: Any) -> int:
    return len(returned) if isinstance(returned, tuple) else 0  # pyright: ignore[reportUnknownArgumentType] - what a layer returns
