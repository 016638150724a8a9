"""A copy of a model with the same function, whose weights are easier to read."""

# Guarantees:
#   - the model itself, its weights and its configuration stay as they are;
#   - after each step the copy is run beside what it was: the same log-probabilities to 1e-4, or
#     UnsupportedError.
# The steps are those of TransformerLens' process_weights; Elhage et al. 2021 explain them.

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from tracekit.architectures import Lacks, Names
from tracekit.architectures.matrices import unfit
from tracekit.core.nest import first_tensor
from tracekit.core.offload import is_offloaded
from tracekit.errors import UnsupportedError
from tracekit.models import centring, folding

TOLERANCE: Final = 1e-4  # of log-probabilities, as parts of how far they lie apart
_TOKENS: Final = 7  # enough for every position to attend to others


class Step(NamedTuple):
    """One step: why it is not right for a model (None: it is), and what it does to a copy."""

    why_not: Callable[[Names, nn.Module], str | None]
    act: Callable[[Names, nn.Module, Callable[[], Tensor]], None]


STEPS: Final[Mapping[str, Step]] = {
    "fold_norms": Step(folding.why_not_fold, folding.fold_norms),
    "center_writing_weights": Step(
        centring.why_not_center_writing, lambda n, r, _: centring.center_writing_weights(n, r)
    ),
    "center_unembed": Step(
        centring.why_not_center_unembed, lambda n, r, _: centring.center_unembed(n, r)
    ),
    "fold_value_biases": Step(
        centring.why_not_fold_value_biases, lambda n, r, _: centring.fold_value_biases(n, r)
    ),
}


def processed(
    names: Names, root: nn.Module, wanted: Mapping[str, bool | None]
) -> tuple[nn.Module, dict[str, str]]:
    """The copy, and of each step what became of it: "done", or "left out: …".

    Of `wanted`, None means: where it is right.
    """
    why = _why_not_at_all(names, root)
    if why is not None:
        raise UnsupportedError(f"its weights can't be processed: {why}.")
    made = _Copy(names, root)
    return made.root, {step: made.take(step, wanted[step]) for step in STEPS}


def _why_not_at_all(names: Names, root: nn.Module) -> str | None:
    config: Any = getattr(root, "config", None)
    for path, module in root.named_modules():
        if is_offloaded(module):
            return f"{path or 'it'} is offloaded: load the model into memory"
    for path, weight in root.named_parameters():
        why = unfit(weight)
        if why is not None or weight.is_meta:
            return f"{path} has no numbers to work with ({why or 'it is on meta'})"
        if weight.dtype not in (torch.float32, torch.float64):
            return f"{path} is {weight.dtype}, too coarse for it: load it with dtype=torch.float32"
    is_of_text = "layers" in names.stacks and names.module("", "embed") is not None
    if not is_of_text or isinstance(centring.unread(names, root), Lacks):
        return "it is no language model with layers and an unembedding that are known"
    if getattr(config, "is_encoder_decoder", False) or "encoder_layers" in names.stacks:
        return "it has two stacks, an encoder's and a decoder's"
    return None


@final
class _Copy:
    """A deep copy, tied weights untied, that takes steps and is checked after each."""

    def __init__(self, names: Names, root: nn.Module) -> None:
        self.root = copy.deepcopy(root)
        self._names = Names(names.family, self.root)
        self._untie()
        self._expected = self._log_probabilities()

    def take(self, name: str, is_wanted: bool | None) -> str:
        """Take a step, or say why not."""
        step = STEPS[name]
        why = "not wanted" if is_wanted is False else step.why_not(self._names, self.root)
        why = why or self._act(step)
        if why is not None:
            if is_wanted:
                raise UnsupportedError(f"{name} is not right for this model: {why}.")
            return f"left out: {why}"
        self._check(name)
        return "done"

    def _act(self, step: Step) -> str | None:
        try:
            with torch.no_grad():
                step.act(self._names, self.root, self._log_probabilities)
        except folding.NoReader as error:
            return str(error)
        return None

    def _untie(self) -> None:
        path = self._names.module("", "unembed")
        assert path is not None
        unembed: Any = self.root.get_submodule(path)
        folding.put(unembed, "weight", unembed.weight)
        config: Any = getattr(self.root, "config", None)
        for each in (config, config.get_text_config()) if config is not None else ():
            if getattr(each, "tie_word_embeddings", False):
                setattr(each, "tie_word_embeddings", False)  # noqa: B010 - a configuration's own

    def _check(self, name: str) -> None:
        expected, found = self._expected, self._log_probabilities()
        off = (found - expected).abs().max().item()
        if not off <= TOLERANCE * max(1e-3, (expected.max() - expected.min()).item()):
            raise UnsupportedError(
                f"{name} is not right for this model: with it the log-probabilities are off by "
                f"{off:.2g}. Leave it out, with {name}=False."
            )
        if name == "center_writing_weights":
            self._check_mean(name)

    def _check_mean(self, name: str) -> None:
        """That all that writes was found: what the final norm reads has mean zero."""
        path = self._names.module("", "final_norm")
        given: list[Tensor] = []
        norm = self.root.get_submodule(path or "")
        hook = norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        self._log_probabilities()
        hook.remove()
        if given[0].mean(-1).abs().max() > TOLERANCE * given[0].abs().max():
            raise UnsupportedError(
                f"{name} is not right for this model: something else than what is centred writes "
                f"into the residual stream. Leave it out, with {name}=False."
            )

    def _log_probabilities(self) -> Tensor:
        """Of the copy as it is, on a few tokens."""
        modes = [(module, module.training) for module in self.root.modules()]
        path = self._names.module("", "embed")
        table: Any = self.root.get_submodule(path or "").weight
        count = table.shape[0]
        ids = torch.arange(1, _TOKENS + 1, device=table.device)[None] * 7919 % count
        self.root.eval()
        with torch.inference_mode(False), torch.no_grad():
            logits = first_tensor(self.root(input_ids=ids))
        for module, mode in modes:
            module.training = mode
        assert logits is not None
        return logits.double().log_softmax(-1)
