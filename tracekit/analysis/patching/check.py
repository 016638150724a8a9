"""A patched run another way: one whole forward of the bare module, with plain PyTorch hooks."""

# Nothing here begins at a layer, goes on behind keys and values, shares a batch or knows the
# mediator; the other prompt is run again as well, and its values are taken with hooks. What no
# module has as its own (values inside an attention function) plain hooks can't see: there a whole
# run of the model's own kind is the other way.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.patching.pairs import Pair
from tracekit.analysis.patching.patches import Target, Where
from tracekit.analysis.patching.runs import write
from tracekit.architectures import Sharing
from tracekit.core.nest import replace_tensor
from tracekit.core.site import Slot
from tracekit.interleave.hooks import is_elsewhere
from tracekit.interleave.worker import this_thread
from tracekit.models.language import LanguageModel
from tracekit.models.signatures import accepts
from tracekit.tracing.named import tensor_of

# How far logits may be off, beside the largest logit; by the size of a number, in bytes.
TOLERANCE: Final = {8: 1e-10, 4: 1e-4, 2: 0.05}

See = Callable[[Tensor], None]


@final
class Recompute:
    """Patched runs of one pair, each recomputed whole."""

    def __init__(self, model: LanguageModel, pair: Pair, wheres: Mapping[str, Where]) -> None:
        self._model, self._pair, self._wheres = model, pair, wheres
        self._modules = dict(model.module.named_modules(remove_duplicate=False))
        self._values: dict[str, Tensor] = {}

    def deviation(self, found: Tensor, targets: Sequence[Target]) -> float:
        """The largest difference of any logit from a recompute of the patched run."""
        return float((found - self.logits(targets)).abs().max())

    @property
    def tolerance(self) -> float:
        """The largest difference that is rounding."""
        largest = float(self._pair.logits.abs().max())
        kinds = (self._pair.logits.dtype, next(self._model.module.parameters()).dtype)
        return TOLERANCE.get(min(kind.itemsize for kind in kinds), 0.05) * max(1.0, largest)

    def logits(self, targets: Sequence[Target]) -> Tensor:
        """The logits at the last position of the patched run, `[vocabulary]`."""
        self._look({target.key for target in targets})
        at: dict[str, list[Target]] = {}
        for target in targets:
            at.setdefault(target.key, []).append(target)
        return self._run(self._pair.base.inputs, {key: self._written(at[key], key) for key in at})

    def _look(self, keys: set[str]) -> None:
        """Take the values of the other run."""
        missing = keys - set(self._values)
        if missing:
            seen = {key: partial(self._take, key) for key in missing}
            self._run(self._pair.source.inputs, seen)

    def _take(self, key: str, value: Tensor) -> None:
        self._values[key] = self._wheres[key].laid_out(value, 1)[0].clone()

    def _written(self, targets: list[Target], key: str) -> See:
        def written(value: Tensor) -> None:
            row = self._wheres[key].laid_out(value, 1)[0]
            for target in targets:
                write(row, self._values[key], target, 0)

        return written

    def _run(self, inputs: Mapping[str, Any], functions: Mapping[str, See]) -> Tensor:
        """The last logits of a forward in which functions see values, and may write into them."""
        plain = {key for key in functions if self._wheres[key].bound.path in self._modules}
        others = [(key, _as_hook(functions[key])) for key in functions if key not in plain]
        module = self._model.module
        with ExitStack() as stack:
            for key in plain:
                handle = self._hook(self._wheres[key], functions[key])
                stack.callback(handle.remove)
            if others:
                return self._model.run_with_hooks(**inputs, fwd_hooks=others)[0, -1]
            options = {"use_cache": False} if accepts(module, "use_cache") else {}
            return module(**inputs, **options).logits[0, -1]

    def _hook(self, where: Where, see: See) -> Any:
        module = self._modules[where.bound.path]
        count, thread = -1, this_thread()

        def seen(value: Any) -> Any:
            nonlocal count
            if is_elsewhere(thread):  # another run of the same model
                return None
            count += 1
            named = where.spot.named
            if named.call is not None and count % named.calls != named.call:
                return None
            return _seen(where, value, see)

        if where.bound.slot is Slot.INPUT:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: seen((args, kwargs)), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, output: seen(output))


def _seen(where: Where, value: Any, see: See) -> Any:
    """What a module goes on with, when `see` has had the activation in it."""
    tensor = tensor_of(where.bound, value)
    if where.bound.sharing is Sharing.SHARED:
        see(where.bound.view(tensor))
        return None
    own = tensor.clone()
    see(where.bound.view(own))
    return replace_tensor(value, tensor, own)


def _as_hook(see: See) -> Callable[[Tensor, object], None]:
    return lambda value, hook: see(value)


def is_off(deviation: float, tolerance: float) -> bool:
    """Whether that is more than rounding; what is no number is."""
    return not deviation <= tolerance


def drawn(count: int, check: int, seed: int | None) -> set[int]:
    """Cells chosen at random, anew each time unless there is a seed."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return set(torch.randperm(count, generator=generator)[:check].tolist())
