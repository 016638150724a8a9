"""A model without its weights, from a host to a client that has none of it."""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn, final

import cloudpickle
import torch
from torch import Tensor, nn

from tracekit.distributed.messages import Message
from tracekit.errors import LoadingError
from tracekit.models.language import LanguageModel
from tracekit.models.model import Model


def outline_of(model: Model) -> Message:
    """The modules of a model with their weights on meta, and its tokenizer."""
    tokenizer = getattr(model, "_tokenizer", None)
    tree: Any = model._tree  # pyright: ignore[reportPrivateUsage] - the model's modules
    file = io.BytesIO()
    padding_side = getattr(model, "_padding_side", None)
    told = (isinstance(model, LanguageModel), tree.root, tree.name, tokenizer, padding_side)
    _Weightless(file, protocol=5).dump(told)
    return Message("outline", {}, [file.getvalue()])


@final
class _Weightless(cloudpickle.Pickler):
    """Pickles tensors as their shapes."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            is_parameter = isinstance(obj, nn.Parameter)
            return _meta, (tuple(obj.shape), obj.dtype, is_parameter, obj.requires_grad)
        return super().reducer_override(obj)


def _meta(shape: Any, dtype: torch.dtype, is_parameter: bool, requires_grad: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor


def model_of(outline: Message, host: object) -> Model:
    """A model of that outline; running it here is refused."""
    is_language_model, root, name, tokenizer, side = pickle.loads(bytes(outline.buffers[0]))
    if is_language_model:
        model: Model = LanguageModel(root, tokenizer=tokenizer, padding_side=side, name=name)
    else:
        model = Model(root, name)

    def refuse() -> NoReturn:
        raise LoadingError(
            f"this is the model of {host} without its weights: it runs there alone, as in "
            f"`with model.trace(input, on=host):`."
        )

    model._tree.load_first = refuse  # pyright: ignore[reportPrivateUsage] - as dispatch=False does
    return model
