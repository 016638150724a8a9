"""Every block of the cache page (cache.md) runs, and prints what is printed there."""

# In transformers 4 a block of GPT-2 returns a tuple, and the page runs as it stands. From 5 on it
# returns the tensor: `.output[0]` of the page would be row 0 of the batch, and `.output` is meant.

from __future__ import annotations

import io
import re
import runpy
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import pytest
import torch
import transformers

from tests.page import gpt2

PAGE = Path(__file__).with_name("cache.md").read_text("utf-8")
BLOCKS_RETURN_TUPLES = int(transformers.__version__.partition(".")[0]) < 5
BLOCK = re.compile(
    r"^## (?P<title>[^\n]+)\n\n```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@final
@dataclass
class Run:
    """What became of the page: the names it bound, what each block printed, what it left."""

    names: dict[str, Any] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    hooks_left: int = 0


def adapted(code: str) -> str:
    """`code` for the transformers that is installed."""
    return code if BLOCKS_RETURN_TUPLES else code.replace(".output[0]", ".output")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The whole page, run block after block where "openai-community/gpt2" is a directory."""
    folder = tmp_path_factory.mktemp("page")
    gpt2.save(folder / "openai-community" / "gpt2")
    done = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(BLOCK.finditer(PAGE)):
            script = folder / f"block_{number}.py"
            script.write_text(adapted(block["code"]), "utf-8")
            with redirect_stdout(io.StringIO()) as out:
                done.names |= runpy.run_path(str(script), init_globals=done.names)
            done.printed[block["title"]] = out.getvalue()
    # Counted here: transformers 5 leaves hooks of its own where a test asks for hidden states.
    done.hooks_left = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in done.names["model"].module.modules()
    )
    yield done
    shutil.rmtree(folder)  # 300 MB, which pytest would keep for three more runs


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        pytest.param(block["title"], block["shown"], id=block["title"])
        for block in BLOCK.finditer(PAGE)
        if block["shown"]
    ],
)
def test_a_block_prints_what_the_page_shows(run: Run, title: str, shown: str) -> None:
    assert run.printed[title] == shown


def test_no_block_of_the_page_was_overlooked(run: Run) -> None:
    assert len(run.printed) == PAGE.count("```python") == 11
    assert PAGE.count("```text") == 9


def test_the_lens_prints_what_hugging_faces_hidden_states_give(run: Run) -> None:
    model = run.names["model"]
    with torch.no_grad():
        result = model(run.names["prompt"], output_hidden_states=True)
        logits = [
            *(model.lm_head(model.transformer.ln_f(h)) for h in result.hidden_states[1:-1]),
            result.logits,  # the last of hidden_states has been through ln_f already
        ]
    tops = [model.tokenizer.decode(found[0, -1].argmax()) for found in logits]
    assert len(set(tops)) > 1
    assert run.printed[
        "Logit lens in one pass"
    ] == "Prompt: 'The Eiffel Tower is in the city of'\n\n" + (
        "".join(f"Layer {i:2d}: {top!r}\n" for i, top in enumerate(tops))
    )


def test_the_keys_and_values_of_a_cache_are_those_of_plain_hooks(run: Run) -> None:
    model, prompt = run.names["model"], run.names["prompt"]
    seen: dict[str, torch.Tensor] = {}

    def see(path: str, _module: Any, _args: Any, output: Any) -> None:
        value = next(iter(output.values())) if isinstance(output, dict) else first(output)
        seen[path] = value.cpu()  # where caches keep what they record

    hooks = [
        module.register_forward_hook(partial(see, f"model.{name}".rstrip(".")))
        for name, module in model.module.named_modules()
    ]
    with torch.no_grad():
        model(prompt)
    for hook in hooks:
        hook.remove()
    with model.trace(prompt) as tracer:
        cache = tracer.cache()
    assert list(cache) == list(seen)
    assert len(seen) == 151
    assert [path for path in seen if not torch.equal(cache[path].hidden, seen[path])] == []


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_the_page_as_printed_would_take_row_0_where_blocks_return_tensors(run: Run) -> None:
    output = run.names["cache"]["model.transformer.h.0"].output
    assert isinstance(output, tuple) is BLOCKS_RETURN_TUPLES
    shape = torch.Size([1, 10, 768] if BLOCKS_RETURN_TUPLES else [10, 768])
    assert output[0].shape == shape
    assert run.names["cache"]["model.transformer.h.0"].hidden.shape == (1, 10, 768)


def test_no_hook_is_left_on_the_model(run: Run) -> None:
    assert run.hooks_left == 0
