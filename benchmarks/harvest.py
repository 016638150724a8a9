"""A harvest to disk, beside the bare forward with hooks that fill a list, and beside SAELens.

    python benchmarks/harvest.py [--width 512] [--tokens 128] [--contexts 64] [--rounds 9]
    python benchmarks/harvest.py --disk 2GB [--folder DIR]

GPT-2 of 12 layers (random weights), one torch thread, contexts of 128 tokens in batches of 16. In
each round every loop goes over the same contexts, in an order drawn anew; the ratio is of the two
times in one round. The harvest writes shards, a batch each, with checksums, each while the next is
made, and ends when all is on the disk. The bare forward is of the layers that are needed, cut off
behind them, with a plain hook on each site that appends what it is given to a list; nothing is
copied or written. SAELens' own ActivationsStore fetches tokens and activations of the same sites,
on a HookedTransformer of the same weights; nothing is written either. All three are held against
each other.

`--disk` writes activations of that size, drops what the system keeps of them in memory, and reads
them back, in order and shuffled: megabytes a second, and seconds of the processor.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

from tracekit import Harvest, LanguageModel, load_activations  # noqa: E402
from tracekit.storage.shards import Told, name_of, write_shard  # noqa: E402

LAYERS: Final = 12
BATCH: Final = 16  # as the harvest does where nothing is said
VOCABULARY: Final = 1000
OF_HOOKS: Final = 0.95
TOLERANCE: Final = 1e-3
CASES: Final = {
    "resid_post of all layers": [f"layers.{n}.resid_post" for n in range(LAYERS)],
    "three sites of layer 6, which is the last to run": [
        "layers.6.resid_pre", "layers.6.mlp_out", "layers.6.resid_post",
    ],
}  # fmt: skip

Loop = Callable[[], Any]  # goes over all contexts once


@dataclass
class Timed:
    """A loop, and what its rounds took."""

    loop: Loop
    wall: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    def run(self) -> None:
        begun = time.perf_counter(), time.process_time()
        result = self.loop()
        self.wall.append(time.perf_counter() - begun[0])
        self.process.append(time.process_time() - begun[1])
        del result


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.disk is not None:
            _disk(Path(folder), options)
            return 0
        module = _module(options)
        generator = torch.Generator().manual_seed(0)
        size = (options.contexts, options.tokens)
        tokens = torch.randint(3, VOCABULARY, size, generator=generator)
        print(
            f"GPT-2, {LAYERS} layers of width {options.width}, {options.contexts} contexts of "
            f"{options.tokens} tokens"
        )
        with torch.no_grad():
            results = [
                _measured(title, sites, module, tokens, Path(folder), options)
                for title, sites in CASES.items()
            ]
    return 0 if all(results) else 1


def _module(options: argparse.Namespace) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=options.width,
        n_head=options.width // 64,
        n_layer=LAYERS,
        n_positions=options.tokens,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


# -- the loops -------------------------------------------------------------------------------------


def _by_tracekit(module: Any, tokens: Tensor, sites: list[str], out: Path) -> Loop:
    """All shards, anew."""
    made = Harvest(LanguageModel(module), tokens, sites, out, shard_documents=BATCH)

    def run() -> dict[str, Tensor]:
        for number in range(made.shards):
            made.path_of(number).unlink(missing_ok=True)
        made.run(progress=False)
        return {}

    return run


def _by_hooks(module: Any, tokens: Tensor, sites: list[str]) -> Loop:
    """The bare forward of the layers needed, with a hook on each site that fills a list."""
    keys = [site.split(".") for site in sites]
    decoder = module.transformer
    needed = decoder.h[: max(int(number) for _, number, _ in keys) + 1]

    def run() -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {site: [] for site in sites}
        handles = [
            _hooked(decoder.h[int(number)], word, found[site])
            for site, (_, number, word) in zip(sites, keys, strict=True)
        ]
        whole, decoder.h = decoder.h, needed
        try:
            for batch in tokens.split(BATCH):
                decoder(input_ids=batch, use_cache=False)
        finally:
            decoder.h = whole
            for handle in handles:
                handle.remove()
        return {site: torch.cat(values) for site, values in found.items()} if WANTED else {}

    return run


WANTED: bool = False  # whether loops hand over what they found, to be compared


def _hooked(layer: Any, word: str, into: list[Tensor]) -> Any:
    if word == "resid_pre":
        return layer.register_forward_pre_hook(lambda _, args: into.append(args[0]))
    place = layer.mlp if word == "mlp_out" else layer
    return place.register_forward_hook(lambda _m, _a, output: into.append(output))


def _by_sae_lens(module: Any, tokens: Tensor, sites: list[str]) -> Loop | None:
    """SAELens' ActivationsStore; None where it is not installed."""
    try:
        import datasets
        from sae_lens.training.activations_store import ActivationsStore
    except ImportError:
        print("sae-lens is not installed: pip install 'sae-lens==6.51.*'")
        return None
    names = [_hook_name(site) for site in sites]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = ActivationsStore(
            _hooked_transformer(module),
            datasets.Dataset.from_dict({"tokens": tokens.tolist()}),
            streaming=False,
            hook_name=names[0],
            hook_head_index=None,
            context_size=tokens.shape[1],
            d_in=module.config.n_embd,
            n_batches_in_buffer=2,
            total_training_tokens=tokens.numel(),
            store_batch_size_prompts=BATCH,
            train_batch_size_tokens=tokens.numel(),
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
    store._hook_names = names
    store._hook_d_ins = dict.fromkeys(names, module.config.n_embd)

    def run() -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for _ in range(-(-len(tokens) // BATCH)):
            for name, value in store.get_multi_hook_activations(store.get_batch_tokens()).items():
                found[name].append(value)
        if not WANTED:
            return {}
        pairs = zip(sites, found.values(), strict=True)
        return {site: torch.cat(values) for site, values in pairs}

    return run


def _hook_name(site: str) -> str:
    _, number, word = site.split(".")
    hook = {"mlp_out": "hook_mlp_out"}.get(word, f"hook_{word}")
    return f"blocks.{number}.{hook}"


def _hooked_transformer(module: Any) -> Any:
    """TransformerLens' HookedTransformer, which SAELens runs, with the weights of `module`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = module.config
    own = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    found = HookedTransformer(own)
    found.load_state_dict(convert_gpt2_weights(module, own), strict=False)
    return found.eval()


# -- side by side ----------------------------------------------------------------------------------


def _measured(
    title: str,
    sites: list[str],
    module: Any,
    tokens: Tensor,
    folder: Path,
    options: argparse.Namespace,
) -> bool:
    """Print what the loops took; whether the bound holds."""
    out = folder / title.replace(" ", "_")
    loops = {
        "harvest": Timed(_by_tracekit(module, tokens, sites, out)),
        "hooks": Timed(_by_hooks(module, tokens, sites)),
    }
    theirs = _by_sae_lens(module, tokens, sites)
    if theirs is not None:
        loops["SAELens"] = Timed(theirs)
    _check_alike(loops, out)
    draw = random.Random(0)
    for _ in range(options.rounds):
        for each in draw.sample(list(loops.values()), len(loops)):
            each.run()
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"\n{title} ({len(sites)} sites, {size:.0f} MB a round)")
    return _report(loops, tokens.numel())


def _check_alike(loops: dict[str, Timed], out: Path) -> None:
    """That all have found the same; it warms them up, too."""
    global WANTED  # noqa: PLW0603 - a benchmark
    WANTED = True
    loops["harvest"].loop()
    own = load_activations(out)
    for name in loops.keys() - {"harvest"}:
        for site, value in loops[name].loop().items():
            off = (own[site][:] - value.flatten(0, 1)).abs().max()
            assert off < TOLERANCE, f"{site} of {name} is off by {off:.1e}"
    WANTED = False


def _report(loops: dict[str, Timed], tokens: int) -> bool:
    print(f"  {'':10s}{'tokens/s':>10s}{'of wall time':>14s}   of hooks: process time, wall time")
    hooks = loops["hooks"]
    holds = True
    for name, each in loops.items():
        rate = tokens / float(np.median(each.wall))
        ratios = [_ratio(hooks.process, each.process), _ratio(hooks.wall, each.wall)]
        told = ",  ".join(f"{m:.3f} ({low:.3f} to {high:.3f})" for low, m, high in ratios)
        print(f"  {name:10s}{rate:>10,.0f}{np.median(each.wall):>12.2f} s   {told}")
        if name == "harvest":
            holds = all(middle >= OF_HOOKS for _, middle, _ in ratios)
    print(f"  harvest of hooks ≥ {OF_HOOKS}, both: {'yes' if holds else 'NO'}")
    return holds


def _ratio(hooks: list[float], own: list[float]) -> tuple[float, float, float]:
    """The speed, of that of hooks: quartiles of the rounds, with the median in the middle."""
    low, middle, high = np.percentile(np.array(hooks) / np.array(own), [25, 50, 75])
    return float(low), float(middle), float(high)


# -- the disk --------------------------------------------------------------------------------------


def _disk(folder: Path, options: argparse.Namespace) -> None:
    """Write activations of so many bytes, and read them."""
    width, rows = 768, 1 << 16  # 96 MB of float16 in a shard
    shards = max(1, round(options.disk / (width * rows * 2)))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, width, generator=generator).half()
    spec = {"sites": ["layers.0.resid_post"]}
    columns = {name: torch.zeros(rows, dtype=torch.int32) for name in ("doc", "pos", "step")}
    with _timed(f"written in {shards} shards", shards * values.nbytes):
        for number in range(shards):
            told = Told(f"{number}", spec, number, shards, number * rows, {})
            own = {**columns, "tokens": torch.full((rows,), number, dtype=torch.int32)}
            write_shard(folder / name_of(number), {"layers.0.resid_post": values}, own, told)
    for title, shuffle in (("read in order", None), ("read shuffled", 0)):
        _forget(folder)
        acts = load_activations(folder)
        with _timed(f"{title}, in batches of 4096", acts.rows * width * 2):
            count = sum(len(batch) for batch in acts.batches(4096, shuffle=shuffle))
        assert count == acts.rows
    acts = load_activations(folder)
    index = torch.randint(0, acts.rows, (4096,), generator=generator)
    with _timed("4096 random rows", 4096 * width * 2):
        acts["layers.0.resid_post"][index]


class _timed:
    """Prints what a `with` took."""

    def __init__(self, title: str, size: int) -> None:
        self._title, self._size = title, size

    def __enter__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall = time.perf_counter() - self._begun[0]
        process = time.process_time() - self._begun[1]
        print(
            f"{self._title:36s} {self._size / 1e9:6.2f} GB in {wall:6.2f} s: "
            f"{self._size / 1e6 / wall:6.0f} MB/s, {process:5.2f} s of the processor"
        )


def _forget(folder: Path) -> None:
    """Let the system drop what it keeps of the files in memory."""
    for path in _files(folder):
        opened = os.open(path, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def _files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, value in [("width", 512), ("tokens", 128), ("contexts", 64), ("rounds", 9)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--disk", type=_bytes, metavar="SIZE", help="as 2GB: the disk alone")
    parser.add_argument("--folder", help="where to write (default: the system's own)")
    return parser.parse_args()


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+)\s*([GM])B?", text)
    if found is None:
        raise argparse.ArgumentTypeError("as 2GB, or 200MB")
    return int(float(found[1]) * {"G": 1e9, "M": 1e6}[found[2]])


if __name__ == "__main__":
    sys.exit(main())
