"""The values inside every attention of the matrix, against eager models with a patched softmax."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny_models import IS_TRANSFORMERS_5, NAMES, make
from tracekit import Model
from tracekit.core.nest import tensors
from tracekit.errors import UnknownPathError

# A state, or convolutions, and no softmax over keys.
WITHOUT_ATTENTION = [n for n in NAMES if n in {"mamba", "mamba2", "rwkv", "xlstm", "convnext"}]
# Its only attention is fused, whatever is asked for.
WITHOUT_EAGER = set[str]() if IS_TRANSFORMERS_5 else {"recurrent_gemma"}
WITH_ATTENTION = [n for n in NAMES if n not in WITHOUT_EAGER and n not in WITHOUT_ATTENTION]
# The softmax has a column for the sink.
WITH_SINKS = {"gpt_oss"}
# What the attention function returns is changed before the projection.
GATED = {"qwen3_next"}

each_model = pytest.mark.parametrize("name", WITH_ATTENTION)
Change = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def made(name: str, attn: str | None = None) -> tuple[Any, dict[str, Any]]:
    return make(name, attn=attn)


@contextmanager
def patched_softmax(
    net: nn.Module, changes: dict[str, Change]
) -> Iterator[dict[str, list[Tensor]]]:
    """By the path of the innermost module that runs, what its softmaxes over keys gave."""
    running: list[str] = []
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def softmax(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        found = original(*args, **kwargs)
        if found.dim() == 4:
            seen[running[-1]].append(found)
            found = changes.get(running[-1], lambda same: same)(found)
        return found

    def begin(path: str, *_: Any) -> None:
        running.append(path)

    def end(*_: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for path, module in net.named_modules(prefix="model"):
            stack.callback(module.register_forward_pre_hook(partial(begin, path)).remove)
            stack.callback(module.register_forward_hook(end).remove)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(F, "softmax", partial(softmax, F.softmax))
        yield seen


@cache
def of_eager(name: str) -> dict[str, list[Tensor]]:
    net, inputs = made(name, "eager")
    with torch.no_grad(), patched_softmax(net, {}) as seen:
        net(**inputs)
    return dict(seen)


def run(name: str) -> tuple[Any, Any]:
    """All values of all attentions of the model as it is made by default, and its result."""
    net, inputs = made(name)
    model = Model(net)
    with model.trace(**inputs) as tracer:
        found = tracer.cache(
            modules=[f"*.attention.{each}" for each in ("v", "scores", "pattern", "z")]
        )
        result = tracer.result
    return found, result


def values(found: Any, path: str, name: str) -> list[Tensor]:
    full = f"{path}.attention.{name}"
    return [entry.output for entry in found[full]] if full in found else []


def uniform(pattern: Tensor) -> Tensor:
    """As much of every key that is seen at all."""
    seen = (pattern > 0).to(pattern.dtype)
    return seen / seen.sum(-1, keepdim=True)


def assert_untouched(net: nn.Module) -> None:
    for module in net.modules():
        assert "forward" not in vars(module)
        keys = [*module._forward_hooks, *module._forward_pre_hooks]
        assert all(key >= 0 for key in keys)  # those of tracekit; transformers may keep its own


@each_model
def test_every_pattern_is_that_of_eager_attention_and_no_bit_of_the_result_changes(
    name: str,
) -> None:
    found, result = run(name)
    net, inputs = made(name)
    plain = net(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(result), strict=True))
    expected = of_eager(name)
    assert {f"{path}.attention.pattern" for path in expected} == {
        path for path in found if path.endswith(".pattern")
    }
    for path, patterns in expected.items():
        mine = values(found, path, "pattern")
        assert len(mine) == len(patterns)
        for one, other in zip(mine, patterns, strict=True):
            of_keys = other[..., : one.shape[-1]].to(one.dtype)
            torch.testing.assert_close(one, of_keys, atol=1e-5, rtol=0)
    assert_untouched(net)


@each_model
def test_the_scores_make_the_pattern_and_the_pattern_makes_z(name: str) -> None:
    found, _ = run(name)
    for path in of_eager(name):
        for scores, pattern, z in zip(
            *(values(found, path, each) for each in ("scores", "pattern", "z")), strict=True
        ):
            if name in WITH_SINKS:
                assert (pattern.sum(-1) < 1).all()
                together = scores.softmax(-1)
                torch.testing.assert_close(together, pattern / pattern.sum(-1, keepdim=True))
            else:
                torch.testing.assert_close(scores.softmax(-1), pattern)
            assert z.shape[:3] == (pattern.shape[0], pattern.shape[2], pattern.shape[1])
        for v, pattern, z in zip(
            *(values(found, path, each) for each in ("v", "pattern", "z")), strict=False
        ):
            heads = v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)
            torch.testing.assert_close((pattern @ heads).transpose(1, 2), z, atol=1e-5, rtol=1e-4)


@each_model
def test_a_written_pattern_makes_what_it_makes_in_an_eager_model(name: str) -> None:
    path = list(of_eager(name))[-1]
    net, inputs = made(name)
    model = Model(net)
    pattern = model.get(path.removeprefix("model.")).attention.pattern
    first = next(iter(of_eager(name)))
    with model.trace(**inputs) as tracer:
        before = tracer.cache(modules=f"{first}.attention.pattern") if first != path else None
        pattern.output = uniform(pattern.output)
        if len(of_eager(name)[path]) > 1:
            again = pattern.calls[1]
            again.output = uniform(again.output)
        result = tracer.result
    eager, _ = made(name, "eager")
    keys = values(run(name)[0], path, "pattern")[0].shape[-1]

    def change(whole: Tensor) -> Tensor:
        return torch.cat([uniform(whole[..., :keys]), whole[..., keys:]], -1)

    with patched_softmax(eager, {path: change}):
        expected = eager(**inputs)
    main, others = (next(t for t in tensors(x) if t.dim()) for x in (result, expected))
    torch.testing.assert_close(main, others, atol=2e-5, rtol=1e-4)
    if before is not None:  # it is computed before what was written
        untouched = of_eager(name)[first][0]
        own = before[f"{first}.attention.pattern"][0].output
        torch.testing.assert_close(own, untouched[..., : own.shape[-1]], atol=1e-5, rtol=0)
    assert_untouched(net)


@pytest.mark.parametrize("name", [name for name in WITH_ATTENTION if name not in GATED])
def test_a_written_z_is_what_the_projection_is_given(name: str) -> None:
    net, inputs = made(name)
    path = next(iter(of_eager(name)))
    z = values(run(name)[0], path, "z")[-1].flatten(-2)
    given: list[nn.Module] = []

    def look(module: nn.Module, args: Any) -> None:
        is_weight = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        is_of_size = is_weight and bool(args) and args[0].numel() == z.numel()
        if is_of_size and torch.equal(args[0].reshape(z.shape), z):
            given.append(module)

    with ExitStack() as stack:
        for module in net.modules():
            stack.callback(module.register_forward_pre_hook(look).remove)
        net(**inputs)
    assert given

    def halve(module: nn.Module, args: Any) -> Any:
        return args[0] * 0.5

    model = Model(net)
    piece = model.get(path.removeprefix("model.")).attention.z
    with model.trace(**inputs) as tracer:
        for call in range(len(of_eager(name)[path])):
            one = piece.calls[call]
            one.output = one.output * 0.5
        result = tracer.result
    with given[0].register_forward_pre_hook(halve):
        expected = net(**inputs)
    for mine, theirs in zip(tensors(result), tensors(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_a_model_without_attention_has_no_patterns(name: str) -> None:
    net, inputs = made(name)
    with pytest.raises(UnknownPathError):
        with Model(net).trace(**inputs) as tracer:
            tracer.cache(modules="*.attention.pattern")
