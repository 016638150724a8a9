"""What the matrix of tiny models is made of: sizes, random inputs, and an entry's declaration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 128
WIDTH = 32
HEADS = 4
LAYERS = 2
INNER = 64  # the width inside an MLP
IMAGE_TOKEN = 5

Inputs = dict[str, Any]
Build = Callable[..., tuple[torch.nn.Module, Inputs]]  # (attn=None, **config) -> model, inputs

# Ids 0 to 2 are special, and 3 to 8 stand for images and their like: random prompts hold none.
SPECIAL_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
BASE = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)
BLOCK = dict(num_attention_heads=HEADS, intermediate_size=INNER)
LLAMA = dict(BASE, **BLOCK, num_key_value_heads=2, max_position_embeddings=128, **SPECIAL_IDS)
GPT2 = dict(
    vocab_size=VOCABULARY,
    n_embd=WIDTH,
    n_layer=LAYERS,
    n_head=HEADS,
    n_positions=128,
    **SPECIAL_IDS,
)
VIT = dict(BLOCK, hidden_size=WIDTH, num_hidden_layers=LAYERS, image_size=16, patch_size=8)
# One encoder and one decoder, under the names that BART's descendants give them.
TWO_STACKS = dict(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=INNER,
    decoder_ffn_dim=INNER,
    **SPECIAL_IDS,
)


@dataclass(frozen=True)
class Spec:
    """One architecture of the matrix."""

    family: str  # decoder | moe | ssm | hybrid | encdec | encoder | vision | vlm | audio
    build: Build
    generate: bool = False
    layers: tuple[str, ...] = ()  # the paths of its lists of blocks
    forward_only: tuple[str, ...] = ()  # inputs that generate() must not get
    generation: dict[str, Any] = field(default_factory=dict)  # what generate() needs besides

    def gen_inputs(self, inputs: Inputs) -> Inputs:
        """The inputs of a forward pass that generate() takes too."""
        return {name: value for name, value in inputs.items() if name not in self.forward_only}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own, so that the inputs do not depend on how a model was initialised."""
    return torch.Generator().manual_seed(seed)


def ids(batch: int = 2, tokens: int = 8, low: int = 10, seed: int = 0) -> torch.Tensor:
    """Random token ids, `(batch, tokens)`, none of them special."""
    return torch.randint(low, VOCABULARY, (batch, tokens), generator=seeded(seed))


def text(batch: int = 2) -> Inputs:
    """Ids and their mask."""
    tokens = ids(batch)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def text_and_decoder_text() -> Inputs:
    """Ids and their mask for the encoder, and four ids for the decoder."""
    return {**text(), "decoder_input_ids": ids(tokens=4, seed=1)}


def pixels(size: int = 16, batch: int = 2) -> torch.Tensor:
    """Random images, `(batch, 3, size, size)`."""
    return torch.randn(batch, 3, size, size, generator=seeded())


def text_around_placeholders(placeholders: int, **more: torch.Tensor) -> Inputs:
    """One row of ids with the given number of image (or audio) tokens in the middle."""
    words = ids(batch=1, tokens=4)
    row = torch.cat([words[:, :2], torch.full((1, placeholders), IMAGE_TOKEN), words[:, 2:]], 1)
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **more}


def from_config(auto: Any, config: Any, attn: str | None) -> torch.nn.Module:
    """A model with random weights, by an Auto class or a model class of transformers."""
    make = getattr(auto, "from_config", None) or auto._from_config
    return make(config, **({"attn_implementation": attn} if attn else {}))


def from_type(auto: Any, model_type: str, attn: str | None, **config: Any) -> torch.nn.Module:
    """A model with random weights, by the name that transformers has for its architecture."""
    return from_config(auto, transformers.AutoConfig.for_model(model_type, **config), attn)
