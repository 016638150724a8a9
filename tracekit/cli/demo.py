"""The demo: looks into the packaged model, layer by layer, and changes what it says."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from tracekit.cli.arguments import TINY
from tracekit.cli.opening import quiet_transformers
from tracekit.cli.status import CHECK_FAILED
from tracekit.models.language import LanguageModel
from tracekit.tracing.cache import Cache

PROMPT = "The Eiffel Tower is in the city of"
OTHER_PROMPT = "The Colosseum is in the city of"
BAR = 24  # characters


def run(_: Namespace) -> int:
    """Run the demo on the packaged model; the exit status."""
    with quiet_transformers(), torch.no_grad():
        return demo(LanguageModel(TINY))


def demo(model: LanguageModel) -> int:
    """Print the logit lens of a cached pass, and an edit that the cache of a second one proves."""
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    print(f"tracekit/tiny: {len(model.transformer.h)} blocks, {parameters / 1e6:.2f} M parameters")
    print(f"prompt: {PROMPT} ...\n")
    with model.trace(PROMPT) as tracer:
        clean = tracer.cache()
    answer, _ = _top(model, clean["model.lm_head"].output)
    _print_lens(model, clean, answer)
    return CHECK_FAILED if _print_edit(model, clean) else 0


def _print_lens(model: LanguageModel, cache: Cache, answer: str) -> None:
    """One line for each block: what the model would say there (the lens of nostalgebraist 2020)."""
    print("Read out after each block, as if it were the last (one pass, one cache):\n")
    print(f"  block   top word   probability   probability of {answer}")
    for index in range(len(model.transformer.h)):
        hidden = cache[f"model.transformer.h.{index}"].hidden
        logits = model.lm_head(model.transformer.ln_f(hidden))
        word, probability = _top(model, logits)
        share = _probability(model, logits, answer)
        bar = ("#" * round(share * BAR)).ljust(BAR, ".")
        print(f"  {index:<8}{word:<11}{probability:<14.3f}{share:.3f}  {bar}")


def _print_edit(model: LanguageModel, clean: Cache) -> int:
    """Swap what one module writes at one position, and check it; the number of failed checks."""
    attention = model.transformer.h[0].attn
    with model.trace(OTHER_PROMPT):
        written = attention.hidden[:, -1].clone()
    with model.trace(PROMPT) as tracer:
        edited = tracer.cache()
        attention.hidden[:, -1] = written
    print("\nAn edit: what the attention of block 0 writes at the last position is replaced")
    print(f"by what it writes there for: {OTHER_PROMPT} ...\n")
    for label, cache in (("before", clean), ("after", edited)):
        word, probability = _top(model, cache["model.lm_head"].output)
        print(f"  {label:<8}{word:<11}{probability:.3f}")
    paths = list(clean)
    place = paths.index(attention.path)
    before, after = paths[:place], paths[place + 1 :]
    changed = [path for path in paths if not _same(clean, edited, path)]
    print("\nThe cache of the edited run, beside that of the clean one:\n")
    return sum(
        (
            _failed(
                torch.equal(edited[attention.path].hidden[:, -1], written),
                f"it holds exactly what was written at {attention.path}",
            ),
            _failed(
                not set(before) & set(changed),
                f"the {len(before)} modules that ended before it are the same, bit for bit",
            ),
            _failed(
                set(after) <= set(changed),
                f"the {len(after)} modules that ended after it have all changed",
            ),
        )
    )


def _failed(holds: bool, what: str) -> bool:
    print(f"  {'ok' if holds else 'FAILED':<8}{what}")
    return not holds


def _same(one: Cache, other: Cache, path: str) -> bool:
    return torch.equal(one[path].hidden, other[path].hidden)


def _top(model: LanguageModel, logits: Tensor) -> tuple[str, float]:
    """The most probable next word and its probability; `logits` are "1 positions vocabulary"."""
    probability, token = logits[0, -1].softmax(dim=-1).max(dim=-1)
    return model.tokenizer.decode(token), probability.item()


def _probability(model: LanguageModel, logits: Tensor, word: str) -> float:
    return logits[0, -1].softmax(dim=-1)[model.tokenizer.convert_tokens_to_ids(word)].item()
