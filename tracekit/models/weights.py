"""What is asked of a model's weights: by standard name, as circuits, as what their biases add."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from tracekit.architectures import Lacks, Names, Stacked
from tracekit.capture import showing_own_lines
from tracekit.core.tree import Tree
from tracekit.errors import MissingNameError
from tracekit.models import biases, circuits
from tracekit.models.biases import Addition
from tracekit.models.circuits import CompositionScores
from tracekit.models.holdings import Weights
from tracekit.models.processing import processed
from tracekit.models.tokenized import Tokenized

M = TypeVar("M", bound="WithWeights")


@final
class NamedWeights(Weights):
    """What is asked of the weights of a model whose layers are known."""

    @showing_own_lines
    def __call__(self, name: str, stack: str = "layers") -> Stacked:
        """`value, layers = model.weights("W_Q")`: of the layers that have it, and which these are.

        For models whose layers differ; `model.W_Q` is refused there, as its places would be no
        layers. `stack` is another list of layers: "encoder_layers", "vision_layers".
        """
        model = self._model
        if model._tree.load_first is not None:
            model._tree.load_first()
        found = model._standard_names().weights(name, stack)
        if isinstance(found, Lacks):
            raise MissingNameError(f"none of its {stack} has {name!r}: {found.reason}.")
        return found


class WithWeights(Tokenized):
    """A model whose weights have standard names.

    `model.layers[3].W_Q` is one layer's, `[heads, model, head_dim]`; `model.W_Q` those of all
    layers, `[layers, heads, model, head_dim]`. `x @ W_Q + b_Q` is `q`: vectors come from the left.
    The names are W_Q, W_K, W_V, W_O, W_in, W_gate, W_out and b_Q … b_out, of the model W_E, W_pos,
    W_U and b_U; `QK` and `OV` are FactoredMatrix.
    """

    __slots__ = ()

    @property
    def weights(self) -> NamedWeights:
        """`model.weights("W_Q")` of all layers that have it; `model.weights.of(module)`, by module.

        Both read what is offloaded from where it lies.
        """
        return NamedWeights(self)

    @showing_own_lines
    def composition_scores(self, mode: str) -> CompositionScores:
        """How much each head reads of what heads of earlier layers write (Elhage et al. 2021).

        Through its queries, keys or values: `mode` "Q", "K" or "V". The gains of norms are in it
        only if they have been folded: `model.processed().composition_scores("K")`.
        """
        return circuits.composition_scores(mode, self.weights("QK"), self.weights("OV"))

    @showing_own_lines
    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """The sum of all output biases in front of a layer, `[model]`: the same in any run.

        `layer` may be the number of layers: behind the last. With `mlp_input` in front of that
        layer's MLP; without `include_mlp_biases` those of attention and mixers alone.
        UnsupportedError where biases don't arrive as they are: through a norm, or of experts that
        are chosen.
        """
        if self._tree.load_first is not None:
            self._tree.load_first()
        names, root = self._standard_names(), self._tree.root
        return biases.accumulated_bias(names, root, layer, mlp_input, include_mlp_biases)

    @showing_own_lines
    def residual_additions(self, layer: int) -> tuple[Addition, ...]:
        """What a layer adds to the residual stream, in order: names, factors, and what comes last.

        UnsupportedError for a layer that does not just add.
        """
        return biases.additions(self._standard_names(), self._tree.root, layer)

    @showing_own_lines
    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The directions whose product with the normed residual stream are these tokens' logits.

        `tokens` is one token, as text or id, or a tensor of ids; the shape is theirs, and `model`
        behind it. Of a stream that is not normed they are the directions only if the final norm
        has been folded: `model.processed()`.
        """
        given = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        ids = torch.as_tensor(given)
        W_U: Tensor = self.W_U
        return W_U.T[ids.to(W_U.device)]

    @showing_own_lines
    def processed(
        self: M,
        *,
        fold_norms: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
    ) -> M:
        """A copy whose weights are easier to read, and whose log-probabilities are the same.

        None: where it is right for this model. True insists: UnsupportedError, with the reason,
        where it is not. `.processing` of the copy says what was done, and what was not, and why.

        `fold_norms` moves gains and biases of the norms that the residual stream is read through
        into the weights that read them. `center_writing_weights` takes the mean off all that is
        written into the stream (where every norm takes it off anyway), `center_unembed` off the
        logits (so they differ by one number at each position). `fold_value_biases` moves b_V,
        through W_O, into b_O.

        The copy is tried beside the model after every step. It has none of its edits. In float32.
        """
        if self._tree.load_first is not None:
            self._tree.load_first()
        wanted = {
            "fold_norms": fold_norms,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
        }
        root, became = processed(self._standard_names(), self._tree.root, wanted)
        tree = Tree(root, self._tree.name, self._tree.renames)
        tree.naming = self._tree.naming
        found = self._with([])
        object.__setattr__(found, "_tree", tree)
        object.__setattr__(found, "_processing", became)
        return found

    @property
    def processing(self) -> Mapping[str, str]:
        """Of a copy made by `processed`, what became of each step; empty for any other model."""
        return MappingProxyType(self._processing)

    def _standard_names(self) -> Names:
        names: Any = self._tree.names
        if not isinstance(names, Names):
            raise MissingNameError(
                f"{type(self._tree.root).__name__} has no standard names: its family is not known."
            )
        return names
