"""Lead values from inside a norm, or an output projection, through modules of their own."""

# Guarantees:
#   - as long as nobody writes, the module gives what it gives untapped, bit for bit;
#   - only what somebody asks for is computed, beside the module's own forward.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor

from tracekit.core.norms import kind_of
from tracekit.core.pieces import Piece
from tracekit.core.tree import Tree
from tracekit.errors import UnsupportedError
from tracekit.interleave.attend import RealWithGradients, Was, own
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.interleave.leading import Leading
from tracekit.interleave.passage import Watch

Forward = Callable[..., Any]


@final
class Inner:
    """The values inside the module at the path `owner`, in one run."""

    def __init__(self, tree: Tree, owner: str, hooks: Hooks, watches: dict[str, Watch]) -> None:
        self._tree = tree
        self._owner = owner
        self._module = tree.module(owner)
        self._hooks = hooks
        self._values = Leading(owner, tree, hooks, watches)
        self._is_projection = f"{owner}.head_result" in tree.modules

    def around(self, call: Forward) -> Forward:
        """What is to run in the place of the forward `call`."""
        return partial(self._projected if self._is_projection else self._normed, call)

    def _normed(self, call: Forward, x: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        if is_elsewhere(self._hooks.thread):
            return output
        if not (self._values.is_wanted("norm_scale") or self._values.is_wanted("norm_normalized")):
            self._values.passed("norm_scale", None)
            self._values.passed("norm_normalized", None)
            return output
        kind = self._tree.norm_kinds.get(self._owner) or kind_of(self._module, x, output)
        if kind is None:
            raise UnsupportedError(
                f"{self._owner} ({type(self._module).__name__}) is no norm whose scale is known."
            )
        self._tree.norm_kinds[self._owner] = kind
        centered = kind.centered(x)
        scale = own(kind.scale(self._module, centered))
        was_scale = Was(scale)
        new_scale = self._values.passed("norm_scale", scale)
        normalized = centered / new_scale
        was = Was(normalized)
        new = self._values.passed("norm_normalized", normalized)
        is_written = new_scale is not scale or was_scale.changed()
        is_written = is_written or new is not normalized or was.changed()
        return self._result(output, partial(kind.affine, self._module, new), is_written)

    def _projected(self, call: Forward, z: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(z, *args, **kwargs)
        if is_elsewhere(self._hooks.thread) or not self._values.is_wanted("head_result"):
            if not is_elsewhere(self._hooks.thread):
                self._values.passed("head_result", None)
            return output
        piece = cast("Piece", self._tree.modules[f"{self._owner}.head_result"])
        if self._hooks.ranks is not None:
            call, z = self._hooks.ranks.on_whole(self._owner, call, z)
        each = z.unflatten(-1, (piece.heads, -1))
        alone = torch.eye(piece.heads, dtype=z.dtype, device=z.device).unsqueeze(-1)
        alone = alone.view(piece.heads, *(1,) * (each.dim() - 2), piece.heads, 1)
        of_heads = call((each * alone).flatten(-2).flatten(0, 1), *args, **kwargs)
        nothing = call(z.new_zeros(*(1,) * (z.dim() - 1), z.shape[-1]), *args, **kwargs)
        result = (of_heads.unflatten(0, (piece.heads, -1)) - nothing).movedim(0, -2)
        was = Was(result)
        new = self._values.passed("head_result", result)
        is_written = new is not result or was.changed()
        return self._result(output, lambda: new.sum(-2) + nothing, is_written)

    def _result(self, output: Any, made: Callable[[], Tensor], is_written: bool) -> Any:
        if is_written:
            return made().to(output.dtype)
        if not (torch.is_grad_enabled() and output.requires_grad):
            return output
        return cast("Tensor", RealWithGradients.apply(made().to(output.dtype), output.detach()))
