"""The models that everybody runs, and the prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

PROMPT_TOKENS = 10
VOCABULARY = 1000
READS = 12  # modules that are read, or cached, one by one


@dataclass(frozen=True)
class Subject:
    """A GPT-2 in evaluation mode; `title` is for people."""

    title: str
    module: Any
    tokenizer: Any
    ids: Tensor

    @property
    def layers(self) -> list[str]:
        """The paths of the blocks, without the root's name."""
        return [f"transformer.h.{index}" for index in range(self.module.config.n_layer)]

    @property
    def places(self) -> list[str]:
        """Twelve paths in the model's order: blocks, or what is in them where there are fewer."""
        if len(self.layers) >= READS:
            return self.layers[:READS]
        return [f"{layer}.{part}" for layer in self.layers for part in ("ln_1", "attn", "mlp")]

    @property
    def many_places(self) -> list[str]:
        """Four paths of each of twelve blocks, in the model's order; all there are with fewer."""
        parts = ("ln_1", "attn", "ln_2", "mlp")
        return [f"{layer}.{part}" for layer in self.layers[:READS] for part in parts]

    def copied(self) -> Subject:
        """The same with a module of its own, for libraries that change the module they wrap."""
        return Subject(self.title, copy.deepcopy(self.module), self.tokenizer, self.ids)


def _packaged() -> Subject:
    from tracekit.models.tiny import WEIGHTS

    module = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS)
    return _subject("tracekit/tiny (4 layers, width 128)", module)


def random_subject(width: int, prompt_tokens: int = PROMPT_TOKENS) -> Subject:
    """A GPT-2 of 12 layers that has learnt nothing."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_head=width // 64 if width > 64 else 4,
        n_layer=12,
        n_positions=128,
    )
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config)
    return _subject(f"GPT-2, 12 layers, width {width}", module, prompt_tokens)


def _subject(title: str, module: Any, prompt_tokens: int = PROMPT_TOKENS) -> Subject:
    from tracekit.models.tiny import WEIGHTS

    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    module.eval()
    module.generation_config.eos_token_id = None  # what is asked for comes
    module.generation_config.pad_token_id = tokenizer.pad_token_id or 0
    generator = torch.Generator().manual_seed(0)
    size = (1, prompt_tokens)
    ids = torch.randint(3, module.config.vocab_size, size, generator=generator)
    return Subject(title, module, tokenizer, ids)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tiny": _packaged,
    "64": lambda: random_subject(64),
    "768": lambda: random_subject(768),
}
