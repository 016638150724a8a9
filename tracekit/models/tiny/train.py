"""Train the packaged model: python -m tracekit.models.tiny.train --seed N --out DIRECTORY

The same seed gives the same weights on the same machine with the same number of threads; another
number of threads adds up in another order. The packaged weights are those of seed 0 with
OMP_NUM_THREADS=2 and torch 2.13.0 on a CPU; that took 9 minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tracekit.models.tiny import tokenizer as tokenizers
from tracekit.models.tiny.corpus import VOCABULARY, rows
from tracekit.models.tiny.evaluate import measure

STEPS = 1600
WORDS_PER_BATCH = 64 * 64
SHORT, LONG = 64, 128  # words in a row, BEGIN included
LONG_EVERY = 4  # steps; only long rows train the later positions, short ones are cheaper
PEAK_RATE = 2e-3
WARM_UP = 100  # steps
FLAT_UNTIL = 0.6  # of all steps; then the rate falls in a line ...
LAST_RATE = 0.02  # ... to this part of its peak
LARGEST_GRADIENT = 1.0


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained model of 0.86 million parameters; draws from torch's global generator."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LONG,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizers.SPECIAL.index(tokenizers.BEGIN),
        eos_token_id=None,
        pad_token_id=tokenizers.SPECIAL.index(tokenizers.PAD),
    )
    return GPT2LMHeadModel(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, words: int = WORDS_PER_BATCH
) -> Iterator[Tensor]:
    """Token ids without end, shape "rows positions"; every batch holds `words` of them."""
    ids = tokenizer.get_vocab()
    short, long = rows(2 * seed, SHORT - 1), rows(2 * seed + 1, LONG - 1)
    step = 0
    while True:
        source, length = (long, LONG) if step % LONG_EVERY == 0 else (short, SHORT)
        chosen = islice(source, words // length)
        yield torch.tensor([[ids[word] for word in [tokenizers.BEGIN, *row]] for row in chosen])
        step += 1


def rate(step: int, steps: int) -> float:
    """The learning rate as a part of its peak: up in a line, flat, down in a line."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    left = (steps - step) / (steps * (1 - FLAT_UNTIL))
    return LAST_RATE + (1 - LAST_RATE) * min(1.0, left)


def train(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, words: int = WORDS_PER_BATCH
) -> GPT2LMHeadModel:
    """A model trained from nothing; torch's global generator is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(tokenizer).train()
    optimizer = AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: rate(step, steps))
    progress = tqdm(batches(tokenizer, seed, words), total=steps, desc="train", mininterval=5)
    for _, ids in zip(range(steps), progress, strict=False):
        loss = _loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def _loss(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a Hugging Face directory: float16 on disk, float32 for whoever loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizers.save(tokenizer, directory)
    copy.deepcopy(model).half().save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"  # else transformers 5 loads what the file holds
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a package must not hold


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("tiny-weights"))
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.overwrite:
        sys.exit(f"{options.out} exists; choose another --out, or say --overwrite")
    tokenizer = tokenizers.build(VOCABULARY, longest=LONG)
    model = train(tokenizer, options.seed, options.steps)
    save(model, tokenizer, options.out)
    print(measure(model, tokenizer))


if __name__ == "__main__":
    main()
