"""Find out where the values of a model lie that lies on several ranks, before it is traced."""

# The model's weights say that it is divided, and among which ranks (DTensor). How its values lie is
# measured: the model runs once, on a few tokens, and so does one of the same configuration that is
# not divided, on fake tensors, which computes nothing. What has the same numbers on all ranks is
# whole; what is as long as the shares together, along one axis, lies divided along that. All else
# is refused.

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.core.annex import PIECES
from tracekit.core.dry import DryMode
from tracekit.core.nest import named_tensors
from tracekit.core.quirks import is_before_5, own_children
from tracekit.core.sharding import WHOLE, Key, Known, Sharding, Unlike
from tracekit.core.shares import Ranks, Share, divided_weights, is_gathered_to_compute
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import RankError, UnsupportedError
from tracekit.interleave.assembly import Assembly
from tracekit.interleave.hooks import Hooks
from tracekit.interleave.interleaver import Interleaver
from tracekit.interleave.meeting import Meeting, agree_on_random, digest
from tracekit.interleave.places import tapped
from tracekit.interleave.taps import is_tappable
from tracekit.interleave.wholes import Values
from tracekit.tracing.call import Follower, TracedCall

_ROWS, _TOKENS = 2, 5  # of the run that is measured: nothing else in a model is so long


class _Seen(NamedTuple):
    """A tensor as one rank has it."""

    shape: torch.Size
    bits: int
    size: float  # the sum of what is in it, without its signs


_Measured = dict[Site, dict[Key, _Seen]]


def sharding_of(tree: Tree) -> Sharding | None:
    """Where the values of the model lie; None if it is not divided. All ranks have to ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if tree.sharding is None and _may_be_divided(tree):
        ranks = ranks_of(tree.root)
        tree.sharding = None if ranks is None else _learned(tree, ranks)
    return tree.sharding


def _may_be_divided(tree: Tree) -> bool:
    """Whether there is a weight that is no plain one; quick, as every trace asks."""
    for module in tree.called.values():
        for weight in module._parameters.values():  # pyright: ignore[reportPrivateUsage] - parameters() is 10 times slower
            if type(weight) is not nn.Parameter and weight is not None:
                return True
    return False


def ranks_of(root: nn.Module) -> Ranks | None:
    """The ranks that have the activations of a model among them; None if each has all of its own.

    UnsupportedError if they lie along several axes of ranks.
    """
    divided = [weight for module in root.modules() for weight in divided_weights(module)]
    if not divided:
        return None
    meshes = {weight.device_mesh for weight in divided}
    mesh = meshes.pop()
    is_gathered = any(map(is_gathered_to_compute, root.modules()))
    if is_gathered and not meshes and mesh.ndim == 1:
        return None  # data parallel: the values of each rank are those of its own batch
    if meshes or mesh.ndim > 1:
        raise UnsupportedError(
            f"{type(root).__name__} is divided along several axes of ranks ({mesh}); tracekit "
            f"knows tensor parallel models, with one: load it with tp_plan='auto' alone."
        )
    if type(root).__module__.startswith("transformers.") and is_before_5():
        raise UnsupportedError(
            "tensor parallel models can be traced from transformers 5 on: before, the values of "
            "their modules lie otherwise. Update transformers, or load the model on one rank."
        )
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def joined(
    tree: Tree, run: Interleaver, hooks: Hooks, call: TracedCall, is_verified: bool
) -> TracedCall:
    """`call`, in a run that all ranks of the model make together, if it lies on several."""
    sharding = sharding_of(tree)
    if sharding is None:
        return call
    if is_verified:
        raise UnsupportedError(
            "verify= holds plain hooks against what a block saw, and in a model that lies on "
            "several ranks these see a part of it: verify the edit with the model on one rank."
        )
    assembly = Assembly(sharding, sharding.meeting, run, hooks)
    run.ranks = hooks.ranks = assembly
    return replace(call, make=partial(_made, assembly, call))


def _made(assembly: Assembly, call: TracedCall, follower: Follower | None) -> Any:
    assembly.begin()
    return call.make(follower)


def called(tree: Tree, path: str, args: Any, kwargs: Any) -> Any:
    """What the module at `path` gives for whole values, as a whole."""
    sharding = sharding_of(tree)
    module, takes, gives = tree.module(path), Site(path, Slot.INPUT), Site(path, Slot.OUTPUT)
    if sharding is None or not (sharding.is_divided(takes) or sharding.is_divided(gives)):
        return module(*args, **kwargs)
    meeting: Meeting = sharding.meeting

    def differs(site: Site, values: Sequence[Tensor]) -> bool:
        return meeting.differ(f"call {site}", "", values) is not None

    values = Values(sharding, differs)
    args, kwargs = values.cut(takes, (args, kwargs))
    return values.whole(gives, module(*args, **kwargs))


def draw_alike(tree: Tree) -> None:
    """Let all ranks draw the random numbers of the first, if the model lies on several."""
    sharding = sharding_of(tree)
    if sharding is not None:
        agree_on_random(sharding.meeting, sharding.device)


def check_tokens(tree: Tree, ids: Tensor) -> None:
    """RankError if the ranks of the model have come to other tokens in a step of a generation."""
    if tree.sharding is None:
        return
    new = str(ids[:, -1].tolist())
    found = tree.sharding.meeting.differ(f"tokens {new} {digest([ids])}", new)
    if found is not None:
        raise RankError(
            f"the ranks of this model chose different tokens, {' and '.join(found)}: a logits "
            f"processor, or whatever else chooses, must do the same on all ranks."
        )


# -- measuring ------------------------------------------------------------------------------------


def _learned(tree: Tree, ranks: Ranks) -> Sharding:
    root = tree.root
    device = next(iter(root.parameters())).device
    sharding = Sharding(root, tree.name, ranks, device)
    sharding.meeting = meeting = Meeting(ranks)
    every: list[_Measured] = meeting.told(_measured(tree, device))
    whole = _whole_shapes(tree) if any(every) else {}
    for site in {site for each in every for site in each}:
        sharding.learn(site, _compared(tree, site, [each.get(site, {}) for each in every], whole))
    for path, module in tree.called.items():
        is_touched = divided_weights(module) or getattr(module, "_is_hooked", False)
        if is_touched and not sharding.is_divided(Site(path, Slot.OUTPUT)):
            sharding.joints.append(path)
    return sharding


def _compared(
    tree: Tree,
    site: Site,
    seen: list[dict[Key, _Seen]],
    whole: Mapping[Site, dict[Key, torch.Size]],
) -> dict[Key, Known]:
    expected = whole.get(site, {})
    keys = {key for each in seen for key in each}
    return {
        key: _lies(tree, site, [each.get(key) for each in seen], expected.get(key)) for key in keys
    }


def _lies(tree: Tree, site: Site, seen: list[_Seen | None], whole: torch.Size | None) -> Known:
    """How a tensor lies that each rank has seen so."""
    first = seen[0]
    if first is None or any(each is None for each in seen):
        return Unlike("not all ranks come to it")
    every = [each for each in seen if each is not None]
    is_same = all(each.shape == first.shape for each in every) and _are_close(every)
    if is_same and whole in (None, first.shape):
        return WHOLE
    if whole is None:
        return Unlike("the ranks have different numbers there")
    return _share(tree, site, [each.shape for each in every], whole)


def _are_close(every: list[_Seen]) -> bool:
    first = every[0]
    if all(each.bits == first.bits for each in every):
        return True
    return first.size > 0 and all(abs(each.size / first.size - 1) < 1e-5 for each in every)


def _share(tree: Tree, site: Site, shapes: list[torch.Size], whole: torch.Size) -> Known:
    if any(len(shape) != len(whole) for shape in shapes):
        return Unlike(f"of {list(whole)} the ranks have {_listed(shapes)}")
    axes = [axis for axis, size in enumerate(whole) if any(each[axis] != size for each in shapes)]
    sizes = tuple(shape[axes[0]] for shape in shapes) if len(axes) == 1 else ()
    if len(axes) != 1 or sum(sizes) != whole[axes[0]] or not _is_chunked(sizes):
        return Unlike(f"of {list(whole)} the ranks have {_listed(shapes)}")
    if _is_among_experts(tree, site.path):
        return Unlike("each has experts of its own")
    module = tree.modules.get(site.path)
    own = _packing(module) if site.slot is Slot.OUTPUT and module is not None else {}
    beside = _packing(tree.modules.get(site.path.rpartition(".")[0]))
    size = whole[axes[0]]
    if size not in own and size in beside:
        return Unlike("several tensors lie in one there, each divided")
    return Share(axes[0] - len(whole), sizes, own.get(size, 1))


def _is_among_experts(tree: Tree, path: str) -> bool:
    """Whether it is inside a module of which each rank has other experts."""
    while path:
        path = path.rpartition(".")[0]
        if hasattr(tree.modules.get(path), "_is_expert_parallel"):
            return True
    return False


def _listed(shapes: list[torch.Size]) -> str:
    return " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))


def _is_chunked(sizes: tuple[int, ...]) -> bool:
    """Whether they are what DTensor makes of a whole: alike, but for the last ones."""
    step, total = sizes[0], sum(sizes)
    expected = [min(step, max(0, total - rank * step)) for rank in range(len(sizes))]
    return list(sizes) == expected


def _packing(module: nn.Module | None) -> dict[int, int]:
    """How many tensors lie in one, by the size of all, where a module's weights are so divided."""
    found: dict[int, int] = {}
    inside = [] if module is None else [module, *own_children(module).values()]
    for each in inside:
        for weight in divided_weights(each) if each is not None else ():
            for placement in weight.placements:
                factor = getattr(placement, "split_factor", 1)
                if factor > 1:
                    found[weight.shape[placement.dim]] = factor
    return found


# -- two runs -------------------------------------------------------------------------------------


def _measured(tree: Tree, device: torch.device) -> _Measured:
    """What each module takes and gives here; nothing, if the model takes no token ids."""
    seen: _Measured = {}

    def note(site: Site, key: Key, tensor: Tensor) -> None:
        size = float(tensor.detach().double().abs().sum())
        seen.setdefault(site, {}).setdefault(key, _Seen(tensor.shape, digest([tensor]), size))

    inputs = _inputs(tree.root, device)
    if inputs:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), _at_rest(tree.root):
            _run(Tree(tree.root, tree.name), inputs, note)
    return seen


def _whole_shapes(tree: Tree) -> dict[Site, dict[Key, torch.Size]]:
    """What they would be in a model that is not divided; nothing, if none can be made."""
    root: Any = tree.root
    shapes: dict[Site, dict[Key, torch.Size]] = {}

    def note(site: Site, key: Key, tensor: Tensor) -> None:
        shapes.setdefault(site, {}).setdefault(key, tensor.shape)

    try:
        config = copy.deepcopy(root.config)
        config.distributed_config = None
        with torch.random.fork_rng([]), DryMode():
            alike = type(root)._from_config(config, dtype=root.dtype).eval()
            _run(Tree(alike, tree.name), _inputs(alike, torch.device("cpu")), note)
    except Exception:  # noqa: BLE001 - whatever a model can't do dry: then less is known of it
        return {}
    return shapes


def _run(tree: Tree, inputs: dict[str, Tensor], note: Any) -> None:
    """One forward pass, of which `note(site, key, tensor)` sees each value of each module."""
    hooks = Hooks(tree.module)
    owners = [path for path in tree.called if is_tappable(tree, path)]
    pieces = [f"{tree.attach(path)}.{name}" for path in owners for name in PIECES]
    led = tapped(tree, pieces)

    def see(site: Site, value: Any) -> None:
        for key, tensor in named_tensors(value):
            note(site, key, tensor)

    def before(site: Site, module: Any, args: Any, kwargs: Any = None) -> None:
        see(site, (args, kwargs))

    def after(site: Site, module: Any, args: Any, output: Any) -> None:
        see(site, output)

    try:
        for path in (*tree.called, *pieces):
            module = tree.module(path)
            hooks.observe([module], Slot.INPUT, partial(before, Site(path, Slot.INPUT)))
            hooks.observe([module], Slot.OUTPUT, partial(after, Site(path, Slot.OUTPUT)))
        with torch.no_grad():
            tree.root(**inputs)
    finally:
        hooks.remove()
        led.remove()


def _inputs(root: Any, device: torch.device) -> dict[str, Tensor]:
    takes = inspect.signature(root.forward).parameters
    if "input_ids" not in takes or not hasattr(root, "config"):
        return {}
    size = getattr(root.config.get_text_config(), "vocab_size", 100)
    ids = torch.arange(_ROWS * _TOKENS, device=device).view(_ROWS, _TOKENS) % size
    more = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    return {"input_ids": ids, **more, **({"use_cache": False} if "use_cache" in takes else {})}  # pyright: ignore


@contextmanager
def _at_rest(root: nn.Module) -> Generator[None]:
    """The model without what is random in it."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
