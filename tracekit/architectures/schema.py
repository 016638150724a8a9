"""What a family of models declares: where the standard names are found in them."""

# A declaration is data. It names modules by their paths; where activations are follows from the
# modules by rules (rules.py), and what a family has otherwise it says in `activations`.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, TypeAlias

from torch import nn

from tracekit.architectures.layouts import Layout, Whole
from tracekit.core.site import Slot


class Residual(Enum):
    """How a block adds to the residual stream; what proofs check, and decompositions rest on."""

    SEQUENTIAL = "resid_mid = resid_pre + attn_out; resid_post = resid_mid + mlp_out"
    PARALLEL = "resid_post = resid_pre + attn_out + mlp_out"
    POST_NORM = "resid_mid = norm1(resid_pre + attn_out); resid_post = norm2(resid_mid + mlp_out)"
    SINGLE = "resid_post = resid_pre + what the one mixer or MLP adds"
    OTHER = "the block adds up in a way of its own"


class Sharing(Enum):
    """Who else the model gives the tensor of an activation to."""

    OWN = "nobody: a write replaces it"
    SHARED = "it is the residual stream itself, used again later: a write goes into the tensor"
    UNUSED = "nobody, nor does the model read it itself: a write is refused"
    APART = "it is used again later, and a write must not be seen there: a copy is handed out"


@dataclass(frozen=True)
class Point:
    """An activation: a value of a module, and how its tensor lies in it."""

    module: str  # a word of the block; "" for the block itself
    slot: Slot
    layout: Layout = field(default_factory=Whole)
    sharing: Sharing = Sharing.OWN
    key: int | None = None  # which tensor of a structure; None: the first
    inside: str = ""  # a path below the module
    shape: str = ""  # where it is not the word's


@dataclass(frozen=True)
class Lacks:
    """Why a family does not have a name."""

    reason: str


# What an activation is declared by; of several, the first whose module is there, or is not asked
# for: `Lacks` stands last, and says why there is none of them.
Declared: TypeAlias = "Point | Lacks | tuple[Point | Lacks, ...]"
# Whether a layer is of a kind, by the module and the configuration of its stack.
Condition: TypeAlias = Callable[[nn.Module, Any], bool]


def output(
    module: str,
    layout: Layout | None = None,
    key: int | None = None,
    sharing: Sharing = Sharing.OWN,
    inside: str = "",
    shape: str = "",
) -> Point:
    """What a module of the block returns."""
    return Point(module, Slot.OUTPUT, layout or Whole(), sharing, key, inside, shape)


def given(
    module: str,
    layout: Layout | None = None,
    sharing: Sharing = Sharing.OWN,
    inside: str = "",
    shape: str = "",
) -> Point:
    """What a module of the block is called with."""
    return Point(module, Slot.INPUT, layout or Whole(), sharing, inside=inside, shape=shape)


# Modules that stand beside those of a model, for values that no module has.
ANNEXES: Final = ("attention", "head_result", "norm_scale", "norm_normalized")


def attended(name: str, layout: Layout | None = None, core: str = "attn_core") -> Point:
    """A value of the attention function that `core` calls, under any backend."""
    return Point(core, Slot.OUTPUT, layout or Whole(), inside=f"attention.{name}")


@dataclass(frozen=True)
class Block:
    """One kind of layer."""

    # By word: paths in the layer; of several, the first that is there.
    modules: Mapping[str, str | tuple[str, ...]]
    residual: Residual = Residual.SEQUENTIAL
    # How q, k and v lie in the output of `qkv`, of each a layout by its place.
    fused: Callable[[int], Layout] | None = None
    activations: Mapping[str, Declared] = field(default_factory=dict[str, Declared])
    # The attribute of the configuration that what is added to the residual stream is multiplied by:
    # all of it, or what has these names.
    scale: str | Mapping[str, str] | None = None
    # What is added behind resid_mid, if that is not mlp_out alone.
    added_last: tuple[str, ...] = ("mlp_out",)
    # Further sizes for its layouts: attributes of `ssm`, whose product the size is.
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    # Which layers are of this kind; None: those that have all the modules in `modules`. The first
    # kind that fits a layer counts.
    when: Condition | None = None
    # Axes that are others here, in the shape of every word: {"batch pos": "batch*pos"}.
    axes: Mapping[str, str] = field(default_factory=dict[str, str])

    def __and__(self, other: Block) -> Block:
        """Layers of this kind and of another: of a mixer, and of an MLP."""
        return replace(
            self,
            modules={**self.modules, **other.modules},
            activations={**self.activations, **other.activations},
            added_last=other.added_last,
            when=lambda layer, config: all(
                each is None or each(layer, config) for each in (self.when, other.when)
            ),
        )

    def factor(self, name: str, config: Any) -> float:
        """What the activation of that name is multiplied by when it is added."""
        scale = self.scale if isinstance(self.scale, str) else (self.scale or {}).get(name)
        return float(getattr(config, scale)) if scale is not None else 1.0


@dataclass(frozen=True)
class Stack:
    """A list of layers, of one kind or several."""

    # Of the list; with `*`, of the layers themselves. Of several, the first that is there.
    path: str | tuple[str, ...]
    blocks: tuple[Block, ...]
    config: str = ""  # where the configuration of these layers is: "text_config", "vision_config"
    # Under which attribute of the module that calls attention, or else of the configuration, the
    # number of "heads" and "kv_heads" is, where it is not under the usual name.
    sizes: Mapping[str, str] = field(default_factory=dict[str, str])
    # The attribute that says how many layers there are, if modules are called several times: with
    # fewer lists (in a path with `*`) than that, each stands for as many in a row.
    repeats: str = ""
    # What a model does to the residual stream between two layers of this stack, or between two of
    # its lists if it has several; and between the last layer and the norm behind it.
    between: str = ""
    behind: str = ""

    @property
    def has_stages(self) -> bool:
        """Whether its lists are stages, of which each has other positions and another width."""
        return bool(self.between) and "*" in str(self.path)


@dataclass(frozen=True)
class SubModel:
    """A model inside a model, of the family that its own configuration says."""

    path: str | tuple[str, ...]  # of several, those that are there
    config: str  # the attribute that its configuration is: "text_config"
    # Which of its words are taken over, and what they are called in the whole; None: all, as is.
    words: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Family:
    """The declaration of one family: `model_types` as configurations have them."""

    name: str
    model_types: tuple[str, ...]
    # Of the whole model, by word: paths below the root; of several, the first that is there.
    modules: Mapping[str, str | tuple[str, ...]]
    stacks: Mapping[str, Stack]  # by word: "layers", "encoder_layers", "vision_layers" …
    activations: Mapping[str, Declared] = field(default_factory=dict[str, Declared])
    lacks: Mapping[str, str] = field(default_factory=dict[str, str])  # names, and why
    # Models inside it that have families of their own; what is declared here goes before.
    parts: tuple[SubModel, ...] = ()
    # Which configurations it is the declaration of, and what is that of the others.
    when: Callable[[Any], bool] | None = None
    otherwise: Family | None = None
