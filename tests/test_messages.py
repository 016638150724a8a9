"""The errors speak to whoever wrote the block: one class, one slug, one test of the text."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.capture.fake_tracer import FakeTracer
from tests.tiny_models import make
from tracekit import LanguageModel, Model, errors, load_cache, settings
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.distributed import LocalHost, connect
from tracekit.errors import TracekitError, TracekitWarning, did_you_mean
from tracekit.tracing.layouts import layouts_of
from tracekit.tracing.sharded import check_tokens

IN_ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]
ERRORS = [cls for cls in IN_ERRORS if issubclass(cls, TracekitError)]
WARNINGS = [cls for cls in IN_ERRORS if issubclass(cls, TracekitWarning)]


@dataclass(frozen=True)
class Case:
    """A mistake that a user makes, and the whole text that they read."""

    provoke: Callable[[], object]
    error: type[TracekitError]
    text: str


NET = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
MODEL = Model(NET)
X = torch.ones(1, 2)


def return_in_a_block_that_must_be_captured() -> Any:
    with FakeTracer():
        return 1


class OwnAttention(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def an_attention_that_can_not_be_tapped() -> None:
    Model(OwnAttention()).attention


def a_value_outside_a_trace() -> None:
    MODEL[0].output


def a_misspelled_value() -> None:
    MODEL[0].ouput


def a_name_that_an_architecture_lacks() -> None:
    net, _ = make("gptj")
    Model(net).layers[0].resid_mid


def a_name_that_is_taken() -> None:
    Model(nn.Sequential(nn.ReLU()), rename={"0": "forward"})


def a_misspelled_path() -> None:
    with MODEL.trace(X) as tracer:
        cache = tracer.cache()
    cache["model.O"]


def a_misspelled_operation() -> None:
    Model(make("gpt2")[0]).transformer.h[0].mlp.source.self_c_prj_0


def the_operations_of_a_builtin() -> None:
    with MODEL.trace(X):
        MODEL[0].source.F_linear_0.source


def a_stream_that_is_gone_through_twice() -> None:
    stream = Model(make("gpt2")[0]).generate_stream(torch.tensor([[11]]), max_new_tokens=1)
    list(stream)
    list(stream)


def a_text_of_two_tokens() -> None:
    LanguageModel("tracekit/tiny").to_single_token("Eiffel Tower")


def the_wrong_order() -> None:
    with MODEL.trace(X):
        MODEL[1].output
        MODEL[0].output


def the_output_of_a_list() -> None:
    gpt2 = Model(make("gpt2")[0])
    with gpt2.trace(torch.tensor([[11]])):
        gpt2.transformer.h.output


def a_step_counted_from_the_end() -> None:
    with MODEL.trace(X) as tracer:
        for _ in tracer.iter[-2]:
            MODEL.output


def a_value_of_another_shape() -> None:
    with MODEL.trace(X):
        MODEL[0].output = torch.ones(1, 3)


def a_value_that_the_model_overwrites() -> None:
    with torch.no_grad(), MODEL.trace(X):
        value = MODEL[0].output
    del value


def a_cache_that_comes_too_late() -> None:
    with MODEL.trace(X) as tracer:
        MODEL[1].output
        tracer.cache(MODEL[0])


def a_gradient_without_a_graph() -> None:
    frozen = Model(nn.Linear(2, 2).requires_grad_(False))
    with frozen.trace(X):
        loss = frozen.output.sum()
        with loss.backward():
            pass


def no_input() -> None:
    with MODEL.trace():
        pass


def a_name_that_never_comes() -> Any:
    with MODEL.trace() as tracer:
        with tracer.invoke(X):
            MODEL.output
        meet = tracer.barrier(2)
        with tracer.invoke(X):
            meet()


def a_name_of_a_later_block() -> None:
    with MODEL.trace() as tracer:
        with tracer.invoke(X):
            MODEL[0].output = later_value  # noqa: F821
        with tracer.invoke(X):
            later_value = MODEL[0].output  # noqa: F841


def rows_that_belong_to_all() -> None:
    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x, "positions": torch.arange(5)}

    model = Model(Shared())
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.output["positions"][:] = 0
        with tracer.invoke(X):
            model.output


def padding_that_is_read() -> None:
    model = LanguageModel(make("rwkv")[0])
    model.trace([[11, 12], [13]])


def an_edit_that_backward_would_not_make() -> None:
    llama = make("llama")[0].train()
    enable = getattr(llama, "activation_checkpointing_enable", None)  # its name since 5.23
    (enable or llama.gradient_checkpointing_enable)()
    model = Model(llama)
    with model.trace(torch.tensor([[11, 12]])):
        model.model.layers[0].mlp.output *= 2


def a_misspelled_name_of_a_model() -> None:
    LanguageModel("tracekit/tny")


def a_misspelled_setting() -> None:
    settings.lift_block = False  # type: ignore[attr-defined]


def an_edit_of_what_is_not_read_again() -> None:
    module, inputs = make("llama4_text")
    model = Model(module)
    with model.trace(**inputs):
        model.layers[1].router_logits[:] = 0


def a_branch_in_a_dry_run() -> None:
    with MODEL.scan(X):
        if MODEL[0].output.sum() > 0:
            pass


def rows_of_every_pair() -> None:
    tree = Tree(EveryPair(), "model")
    layouts = layouts_of(tree, lambda rows: lambda twin: twin.root(torch.ones(rows, 2)))
    layouts.of(Site("model", Slot.OUTPUT), torch.ones(4, 4), batch=4)


class EveryPair(nn.Module):
    """Compares every row with every other, as CLIP does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


def a_value_that_can_not_be_sent() -> None:
    guard = threading.Lock()
    with MODEL.trace(X, on=LocalHost(MODEL)):
        guard.acquire()


def a_host_that_is_not_there() -> None:
    connect(("127.0.0.1", 1), "key")


def a_host_of_another_model() -> None:
    Model(nn.Linear(2, 2)).trace(X, on=LocalHost(MODEL)).run(lambda: None)


def a_value_that_stayed_on_the_host() -> None:
    with MODEL.trace(X, on=LocalHost(MODEL)):
        numbers = (each for each in range(3))
    list(numbers)


def a_block_that_does_not_end() -> None:
    with MODEL.trace(X, on=LocalHost(MODEL, timeout=0.25)):
        while True:
            pass


def line(function: Callable[[], object], number: int) -> str:
    """The how-manieth line of a function, as messages name it; the line of its `def` is 0."""
    return f"line {function.__code__.co_firstlineno + number}"


def tokens_that_are_others_on_each_rank() -> None:
    tree = Tree(NET, "model")
    differ = SimpleNamespace(differ=lambda key, text: [text, "[8]"])  # pyright: ignore[reportUnknownLambdaType]
    tree.sharding = SimpleNamespace(meeting=differ)
    check_tokens(tree, torch.tensor([[3, 7]]))


def a_cache_that_is_not_there() -> None:
    load_cache("no-such-run")


def a_weight_that_is_elsewhere() -> None:
    import accelerate

    net = accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))
    model = Model(net)
    with model.trace(X):
        model[0].input @ net[0].weight


def a_device_that_fails_with_values_under_way() -> None:
    from tests.fake_lane import HERE, Accelerator

    accelerator = Accelerator()
    accelerator.fails_after = 0
    with accelerator.at_work(), MODEL.trace(X) as tracer:
        tracer.cache(device=HERE)


CASES = [
    Case(
        a_value_that_can_not_be_sent,
        errors.UnsendableError,
        "the block uses 'guard', a lock, which can't be sent to the host: cannot pickle "
        "'_thread.lock' object. Make it in the block, or take what the block needs from it before. "
        "[unsendable]",
    ),
    Case(
        a_host_that_is_not_there,
        errors.HostError,
        "no host answers at 127.0.0.1:1 ([Errno 111] Connection refused): start one with "
        "tracekit.serve(...), or `tracekit serve MODEL`. [host]",
    ),
    Case(
        a_host_of_another_model,
        errors.OtherModelError,
        "the model here is a Linear (1 modules, 6 weights), and that of <LocalHost of Sequential> "
        "is a Sequential (3 modules, 6 weights): they differ in their class, their modules, the "
        "shapes of weights. Trace the model that is served (`host.model` is one without weights), "
        "or serve this one. [other-model]",
    ),
    Case(
        a_value_that_stayed_on_the_host,
        errors.RemoteError,
        "numbers stayed on the host, as it can't be sent: a generator: cannot pickle 'generator' "
        "object. Bind what you need of it in the block. [remote]",
    ),
    Case(
        a_block_that_does_not_end,
        errors.TimeLimitError,
        "the block took longer than the 0.25 seconds it was given on its host, and was stopped "
        "there; what it had bound until then is bound here. [time-limit]",
    ),
    Case(
        a_text_of_two_tokens,
        errors.TokenError,
        "'Eiffel Tower' is 2 tokens ('Eiffel', 'Tower'), not one. model.to_str_tokens(text) shows "
        "the tokens of a text. [token]",
    ),
    Case(
        return_in_a_block_that_must_be_captured,
        errors.CaptureError,
        f"{__file__}:{return_in_a_block_that_must_be_captured.__code__.co_firstlineno + 2}: "
        "`return` cannot be lifted out of the block; move it after the block [capture]",
    ),
    Case(
        a_value_outside_a_trace,
        errors.OutsideTraceError,
        "model.0.output has a value only while the model runs: ask for it in the block of `with "
        "model.trace(input):` or, in a trace that was opened without input, of `with "
        "tracer.invoke(input):`; after it, use the names that the block bound, or a "
        "tracer.cache(). [outside-trace]",
    ),
    Case(
        a_misspelled_value,
        errors.UnknownModuleError,
        "'ouput' is not in Linear (model.0); did you mean 'output' or 'input'? [unknown-module]",
    ),
    Case(
        a_name_that_an_architecture_lacks,
        errors.MissingNameError,
        "model.transformer.h.0 (GPTJBlock) has no 'resid_mid': attention and MLP are added in one "
        "sum: there is nothing between them. [missing-name]",
    ),
    Case(
        a_name_that_is_taken,
        errors.AliasError,
        "'forward' can't be another name of model.0: model.forward is something else already. "
        "[alias]",
    ),
    Case(
        a_misspelled_path,
        errors.UnknownPathError,
        "'model.O' is not in this cache; did you mean 'model.1' or 'model.0' or 'model'? "
        "[unknown-path]",
    ),
    Case(
        a_misspelled_operation,
        errors.UnknownOperationError,
        "'self_c_prj_0' is no operation of model.transformer.h.0.mlp.source (print it to see all "
        "of them); did you mean 'self_c_proj_0' or 'self_c_fc_0' or 'self_act_0'? "
        "[unknown-operation]",
    ),
    Case(
        an_attention_that_can_not_be_tapped,
        errors.AttentionError,
        "model.attention can't be had: the forward of OwnAttention makes no call of an attention "
        "function, nor of a softmax; ask the module that does, as in "
        "model.transformer.h[0].attn.attention.pattern. "
        "[attention]",
    ),
    Case(
        the_operations_of_a_builtin,
        errors.SourceError,
        "torch._C._nn.linear is not written in Python (a builtin_function_or_method): there are no "
        "operations to stop at in it; its own input and output can be read and edited. [source]",
    ),
    Case(
        the_wrong_order,
        errors.SiteOrderError,
        "model.0.output (step 0) was asked for after model.1.output (step 0) "
        f"({line(the_wrong_order, 2)}), but the model runs it before; ask in the model's order, "
        "or use tracer.cache(). [site-order]",
    ),
    Case(
        the_output_of_a_list,
        errors.NeverRanError,
        "model.transformer.h is a ModuleList, which is never called and has no output; ask one "
        "of its modules, as in model.transformer.h[0].output. [never-ran]",
    ),
    Case(
        a_step_counted_from_the_end,
        errors.StepError,
        "there is no step -2: the run has 1 step; leave it out. [step]",
    ),
    Case(
        a_stream_that_is_gone_through_twice,
        errors.StreamError,
        "a stream is gone through once: call model.generate_stream(...) again for another. "
        "[stream]",
    ),
    Case(
        a_value_of_another_shape,
        errors.MisfitError,
        "model.0.output cannot be replaced so: the value was Tensor[1, 2] float32 cpu, and "
        "Tensor[1, 3] float32 cpu was written; write a value of the same structure, shape, dtype "
        "and device. [misfit]",
    ),
    Case(
        a_value_that_the_model_overwrites,
        errors.OverwrittenError,
        "model.0.output (step 0) was overwritten in place after the block had read it, by the "
        "model or by a later edit of a value that shares its memory: take "
        "model.0.output.clone() where you read it. [overwritten]",
    ),
    Case(
        a_cache_that_comes_too_late,
        errors.CacheError,
        "tracer.cache() was called when the model had passed model.0 (step 0); make the cache "
        "first in the block, or name modules that come later. [cache]",
    ),
    Case(
        a_device_that_fails_with_values_under_way,
        errors.OffloadError,
        "what was recorded last did not come to the host, and is not in the cache: CUDA error: an "
        "illegal memory access was encountered. An operation of the model may be the cause, as "
        "devices tell late: with tracekit.settings.offload_bytes = 0 each value is copied at "
        "once. [offload]",
    ),
    Case(
        a_gradient_without_a_graph,
        errors.GradientError,
        "there is no way back from Tensor[] float32 cpu (a leaf): it does not require grad: it "
        "was detached, or computed under torch.no_grad(), or from nothing that does (frozen "
        "parameters: make an early value the leaf of the graph, as in "
        "model.transformer.wte.output.requires_grad_(True)). [gradient]",
    ),
    Case(
        a_branch_in_a_dry_run,
        errors.DryRunError,
        "`.item()`, or a tensor in an `if`, needs numbers, and a dry run has none: ask for shapes, "
        "dtypes and devices, or write trace() for scan(). [dry-run]",
    ),
    Case(
        rows_of_every_pair,
        errors.RowsError,
        "model.output (Tensor[4, 4] float32 cpu) can't be divided into the rows of each invoke: "
        "its axes [0, 1] all grow with the batch. Ask for it in an invoke() without input, which "
        "sees the whole batch, or trace the inputs one by one. [rows]",
    ),
    Case(
        no_input,
        errors.InputError,
        "this trace has no input: give one, as in model.trace(input), or open a `with "
        "tracer.invoke(input):` for each input in its block. [input]",
    ),
    Case(
        a_name_that_never_comes,
        errors.NeverCameError,
        "the block waited for 2 blocks to call a barrier, and the run ended before that came; read "
        "the value where the model still can go on to it, or in a trace of its own. [never-came]",
    ),
    Case(
        a_name_of_a_later_block,
        errors.LaterBlockError,
        f"'later_value' is bound by the block at {line(a_name_of_a_later_block, 4)}, which stands "
        "after this one: put that block first, or let both call a barrier where it is bound "
        "(barrier = tracer.barrier(2)). [later-block]",
    ),
    Case(
        rows_that_belong_to_all,
        errors.RowsError,
        "model.output (step 0) has a tensor of shape (5,) that belongs to all rows alike, and the "
        "block of one invoke changed it; change it in `with tracer.invoke():`, which stands for "
        f"all of them. The block asked for it at {line(rows_that_belong_to_all, 8)}. [rows]",
    ),
    Case(
        padding_that_is_read,
        errors.PaddingError,
        "rwkv reads its padding: in a padded batch its rows would not be what each is alone. "
        "Trace the rows one by one, or give rows of equal length. [padding]",
    ),
    Case(
        an_edit_that_backward_would_not_make,
        errors.UnsupportedError,
        "model.model.layers.0.mlp.output (step 0) was edited inside a layer under gradient "
        "checkpointing: backward would compute the layer again without the edit, and give other "
        "gradients. Switch checkpointing off, or edit the layer's own output. "
        "[unsupported]",
    ),
    Case(
        an_edit_of_what_is_not_read_again,
        errors.LostError,
        f"router_logits ({line(an_edit_of_what_is_not_read_again, 4)}) was edited in place, and "
        "nothing in the model reads it again, so "
        "the edit would change nothing: edit router_weights or router_indices, or a .clone() to "
        "compute with. [lost]",
    ),
    Case(
        tokens_that_are_others_on_each_rank,
        errors.RankError,
        "the ranks of this model chose different tokens, [7] and [8]: a logits processor, or "
        "whatever else chooses, must do the same on all ranks. [ranks]",
    ),
    Case(
        a_misspelled_name_of_a_model,
        errors.LoadingError,
        "'tracekit/tny' is not packaged with tracekit; did you mean 'tracekit/tiny'? [loading]",
    ),
    Case(
        a_cache_that_is_not_there,
        errors.StorageError,
        "there is no folder 'no-such-run': give one that a cache is in. [storage]",
    ),
    Case(
        a_weight_that_is_elsewhere,
        errors.OffloadedError,
        "model.0.weight is offloaded, not in memory: matmul with it would give garbage. Call the "
        "module instead, as in model.0(x), or take a copy: model.weights.of(model.0)['weight']. If "
        "it is the model's own forward that reads a weight of a module that it does not call, "
        "accelerate has to bring it: preload_module_classes= of disk_offload, cpu_offload and "
        "dispatch_model. [offloaded]",
    ),
    Case(
        a_misspelled_setting,
        errors.SettingError,
        "'lift_block' is not a setting; did you mean 'lift_blocks'? "
        "(there: defer_reads, lift_blocks, offload_bytes). [setting]",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.error.slug)
def test_a_mistake_is_answered_with_this_text(case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.provoke()
    assert str(caught.value) == case.text


def test_every_class_of_error_has_a_case_with_its_text() -> None:
    tested = {case.error for case in CASES}
    assert [cls.__name__ for cls in ERRORS if cls not in tested and not cls.__subclasses__()] == []


def test_the_tree_of_errors_is_found() -> None:
    assert TracekitError in ERRORS
    assert len(ERRORS) > 1


def test_no_two_errors_share_a_slug() -> None:
    shared = {slug: n for slug, n in Counter(cls.slug for cls in ERRORS).items() if n > 1}
    assert not shared


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_the_text_of_an_error_ends_in_its_own_slug(cls: type[TracekitError]) -> None:
    assert "slug" in vars(cls), "a slug of its own, not its parent's"
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.slug)
    assert str(cls("what was asked")) == f"what was asked [{cls.slug}]"


@pytest.mark.parametrize("cls", ERRORS + WARNINGS, ids=lambda cls: cls.__name__)
def test_an_error_says_in_one_sentence_when_it_comes(cls: type[BaseException]) -> None:
    assert (cls.__doc__ or "").strip().endswith(".")


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_a_users_broad_except_can_catch_an_error(cls: type[TracekitError]) -> None:
    assert issubclass(cls, Exception)


def test_a_near_miss_is_suggested_and_a_far_one_is_not() -> None:
    assert did_you_mean("self_atn", ["self_attn", "mlp"]) == "; did you mean 'self_attn'?"
    assert did_you_mean("zzz", ["self_attn", "mlp"]) == ""
