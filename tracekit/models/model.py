"""A Model is any nn.Module that can be traced; it is the Envoy of its own root."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from tracekit.architectures import names_of
from tracekit.capture import caller_frame, is_with_item, showing_own_lines
from tracekit.core.renames import Rename, Renames
from tracekit.core.tree import Tree
from tracekit.errors import InputError
from tracekit.models.batching import Batch, Joined, is_without_input
from tracekit.models.face import calling
from tracekit.models.functional import Functional
from tracekit.models.generation import forward, generate, generation
from tracekit.models.holdings import Weights
from tracekit.models.planning import Planner, is_a_block
from tracekit.models.scanning import fake_twin, run_dry
from tracekit.models.signatures import takes_input
from tracekit.models.streaming import Plan, Stream, Streamer, check_streams, stream
from tracekit.models.texts import Texts
from tracekit.models.verification import refuse_generation, verify
from tracekit.models.wrapped import check_module
from tracekit.tracing.call import TracedCall
from tracekit.tracing.declared import Outcome
from tracekit.tracing.edit import Edit, of_function
from tracekit.tracing.edits import Editing, Edits, run_edited
from tracekit.tracing.elsewhere import Host, Sent, called_on, streamed_on
from tracekit.tracing.execution import Intervention
from tracekit.tracing.hooked import Hooked
from tracekit.tracing.select import Selector
from tracekit.tracing.session import Session
from tracekit.tracing.tracer import Tracer
from tracekit.tracing.verified.expecting import Meant
from tracekit.tracing.verified.report import EditReport
from tracekit.tracing.verified.run import BUDGET, Verifier, Wanted

M = TypeVar("M", bound="Model")


class Model(Functional):
    """Any PyTorch module, ready to be traced.

    The module itself is not changed: outside a trace it runs as if tracekit were not there.
    `name` is the first part of every path, as in `model.layers.0`. `rename` gives modules other
    names, which are valid wherever paths and attributes are: `{"transformer.h": "layers"}`; keys
    are paths below any module, with `*` for any part of one, or classes of modules.
    """

    __slots__ = ("_edits",)

    def __init__(
        self, module: nn.Module, name: str = "model", *, rename: Rename | None = None
    ) -> None:
        check_module(module)
        renames = Renames(rename, frozenset(dir(type(self)))) if rename else None
        super().__init__(Tree(module, name, renames), name)
        self._tree.naming = names_of
        object.__setattr__(self, "_edits", [])
        object.__setattr__(self, "_functions", [])

    @showing_own_lines
    def trace(
        self,
        *args: Any,
        start_at_layer: int | None = None,
        verify: bool | Mapping[str, Any] = False,
        on: Host | None = None,
        **kwargs: Any,
    ) -> Tracer:
        """`with model.trace(input) as tracer:` runs the block beside one forward pass.

        Takes what the module's forward takes. Without input, each `with tracer.invoke(input):` in
        the block has rows of its own in one pass; inputs are joined along their first axis.
        With `start_at_layer=k` the input is the residual stream in front of that layer, and nothing
        before it is computed. With `verify=True`, `tracer.report` says what each edit did:
        `model.verify` explains it, and what else `verify=` takes. With `on=host` the block runs on
        a model that lives elsewhere (tracekit.distributed), and what it binds comes back.
        """
        if on is not None:
            return self._sent(on, "trace", args, kwargs, start_at_layer, verify)
        wanted = Wanted.of(verify)
        begun = self._begun(start_at_layer, args, kwargs)
        if begun is not None:
            return self._tracer(begun.call, tree=begun.tree, verify=wanted)
        if is_without_input(args, kwargs) and takes_input(self._tree.root):
            return self._tracer(self._batch(kwargs, forward, "trace"), verify=wanted)
        return self._tracer(self._pass(args, kwargs), verify=wanted)

    @showing_own_lines
    def verify(
        self,
        edit: object,
        *args: Any,
        rows: Sequence[int] | int | None = None,
        positions: Sequence[int] | int | None = None,
        modules: Sequence[str] | str | None = None,
        watch: Selector | None = None,
        budget: float = BUDGET,
        check_precision: bool | None = None,
        **kwargs: Any,
    ) -> EditReport:
        """`report = model.verify(edit, input)`: did the edit do what was meant, and nothing else?

        `edit` is an edited model, a lasting edit, `(modules, change)` as `run` takes it, `(name,
        fn)` as `run_with_hooks` does, a function that is run as a block, or a list of these; all
        else goes to the forward pass, as in `trace`. The run is held against one without edits, on
        the same input and random numbers: by plain hooks on every module, which know nothing of
        edits. Print the report; it is true if all is well, and `.problems` says what is not.

        `rows`, `positions` (a row's own, from 0) and `modules` are what the edit is meant to touch,
        all of it and nothing else. `watch`: compare these modules alone; of the run without edits
        up to `budget` bytes are kept. In half precision, or with `check_precision=True`, the edit
        is made in float32 too, with a copy of the weights. The model runs 3 times, and twice that
        with float32. Problems have slugs: "never-fired", "changed-nothing", "overwritten", "lost",
        "changed-before", "other-rows", "wrong-row", "wrong-position", "wrong-module", "missed-row",
        "missed-position", "missed-module", "not-in-cache", "precision-only", "precision-noise",
        "late", "no-edit", and those of errors.
        """
        meant = Meant.of(rows, positions, modules)
        return verify(self, edit, args, kwargs, Wanted(meant, watch, budget, check_precision))

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
        """One forward pass, on what `trace` takes."""
        return TracedCall(lambda follower: forward(self._tree, follower, args, kwargs))

    @showing_own_lines
    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """`with model.scan(input) as tracer:` is a dry run of what `trace(input)` would do.

        The same block, on fake tensors: shapes, dtypes, devices, the order of modules and whether
        edits fit, each error at its line. It computes nothing and needs no weights. What it binds
        stays fake: whoever asks it for numbers gets a DryRunError, as does who scans a model that
        decides by its values.
        """
        twin = fake_twin(self._tree)
        if is_without_input(args, kwargs) and takes_input(self._tree.root):
            return self._tracer(self._batch(kwargs, run_dry, "trace", twin), tree=twin)
        return self._tracer(TracedCall(lambda _: run_dry(twin, _, args, kwargs)), tree=twin)

    @showing_own_lines
    def plan(
        self,
        *args: Any,
        memory: Mapping[str, str | int] | None = None,
        device: Any = None,
        all_steps: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`with model.plan(input) as tracer:` tells what a trace will hold in memory.

        A dry run of the same block, on fake tensors: nothing is computed, and weights that were
        left out stay so. Behind the block, `tracer.plan` is the Plan: bytes of each site and step,
        weights, kv_cache, the peak of each device, and `verdict`: "fits", "offload" or "does not
        fit". `plan = model.plan(function, input)` does so with a function as the block, and
        `model.plan(input)` alone with none. All else is what `trace` takes; with `max_new_tokens=`
        (or `max_length=`) it is a generation in which no row ends early.

        `memory` says what there is, as `{"cpu": "16GB", "cuda:0": "24GB"}`; by default what is free
        on this machine. `device`: where the model is taken to be. A generation is run for five
        steps, and sizes go on as they grow; all are run where a block asks about single steps,
        where a window is filled, and with `all_steps=True`.

        Not counted: what a kernel allocates for itself, what an allocator keeps beside (fragments,
        the CUDA context), and tensors of the user's that the block brings along.
        """
        function = args[0] if args and is_a_block(args[0]) else None
        rest = args if function is None else args[1:]
        planner = Planner(self, rest, kwargs, memory, device, all_steps)
        if function is None and is_with_item(caller_frame()):
            return planner
        return planner.run(function)

    @showing_own_lines
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; as the header of a `with`, trace all its steps, else return the tokens.

        Takes what the module's own `generate` takes (Hugging Face: `max_new_tokens`, …).
        """
        if is_with_item(caller_frame()):
            return self.generation(*args, **kwargs)
        if kwargs.get("on") is not None:
            return called_on(self, "generate", args, kwargs)
        refuse_generation(kwargs)
        self._check_generates()
        return self._made(self._generation(args, kwargs))

    @showing_own_lines
    def generation(self, *args: Any, **kwargs: Any) -> Tracer:
        """The tracer of `with model.generate(...)`, wherever it stands.

        For an ExitStack, or to run a function: `model.generation(x, ...).run(function)`.
        """
        if kwargs.get("on") is not None:
            return self._sent(kwargs.pop("on"), "generation", args, kwargs)
        refuse_generation(kwargs)
        self._check_generates()
        if is_without_input(args, kwargs):
            return self._tracer(self._batch(kwargs, generate, "generate"), grad=False)
        call = self._generation(args, kwargs)
        return self._tracer(call, grad=False)  # generate runs without gradients

    @showing_own_lines
    def generate_stream(
        self,
        *args: Any,
        capture: Selector = (),
        edits: Iterable[Any] = (),
        run: Callable[..., Any] | None = None,
        cache_options: Mapping[str, Any] | None = None,
        return_type: str | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Stream:
        """`for text in model.generate_stream(prompt, max_new_tokens=8):` gives each step's text.

        A string, or a list of strings for several rows; what may yet become another character is
        held back. Without a tokenizer, or with `return_type="tokens"`: ids, (rows, tokens).

        `stream.cache` has the modules of `capture`, from the first item on and up to the last one;
        `cache_options` are further arguments of `tracer.cache`. `edits` are made as by
        `Tracer.run`, and `run` is a function, as there, that runs beside all steps. In the end
        `stream.result` is what `generate` returned. With `on=host` all this is made on a host,
        which does not wait between items; the cache comes at the end.
        """
        if options.get("on") is not None:
            own = {"capture": capture, "edits": [*edits], "run": run, "return_type": return_type}
            own |= {"cache_options": cache_options, "skip_special_tokens": skip_special_tokens}
            return streamed_on(self, args, {**own, **options})
        refuse_generation(options)
        self._check_generates()
        texts = self._texts(args, return_type, skip_special_tokens)

        def plan(streamer: Streamer) -> Plan:
            call = self._generation(args, {**options, "streamer": streamer})
            check_streams(self._tree.root, options)  # which has its weights by now
            lasting = self._interventions()
            more = dict(cache_options or {})
            return Plan(self._tree, call, lasting, capture, more, edits, run)

        return stream(plan, options.get("streamer"), texts)

    def _texts(
        self, args: tuple[Any, ...], return_type: str | None, skip_special_tokens: bool
    ) -> Texts | None:
        """The texts of a stream that is about to begin; None where ids are wanted."""
        if return_type in (None, "tokens"):
            return None
        raise InputError(
            f"return_type= of a stream is 'tokens' where there is no tokenizer, not "
            f"{return_type!r}: LanguageModel(module, tokenizer=…) gives texts."
        )

    @showing_own_lines
    def run(
        self, *args: Any, capture: Selector = (), edits: Iterable[Any] = (), **kwargs: Any
    ) -> Outcome:
        """One forward pass with no block: what to record, and what to edit, said in data.

        `model.run(x, capture="layers.*", edits=[("layers.3.mlp", lambda h: h * 2)])` returns an
        Outcome, with `.result` and `.cache`. All else goes to the forward pass, as in `trace`;
        `Tracer.run` says what `capture` and `edits` take.
        """
        return self.trace(*args, **kwargs).run(capture=capture, edits=edits)

    def _made(self, call: TracedCall) -> Any:
        """What a generation returns, with the lasting edits."""
        return self._edited(call, grad=False) if self._is_edited else call.make(None)

    def _generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
        return generation(self._tree, args, kwargs)

    def _check_generates(self) -> None:
        module = self._tree.root
        if not callable(getattr(module, "generate", None)):
            raise InputError(f"{type(module).__name__} has no generate().")

    def _batch(
        self, shared: dict[str, Any], call: Callable[..., Any], kind: str, twin: Tree | None = None
    ) -> Batch:
        return Batch(Joined(shared), twin or self._tree, call, kind)

    @showing_own_lines
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on values, with its lasting edits; no trace around sees this call."""
        if not self._is_edited:
            return super().__call__(*args, **kwargs)
        return self._edited(
            TracedCall(lambda follower: forward(self._tree, follower, args, kwargs))
        )

    def session(self) -> Session:
        """`with model.session() as session:` holds several traces that share their values.

        Its block runs where it stands, and what a trace in it binds is there for the next, as it
        is without a session; `session.stop()` leaves it from anywhere, also from within a trace.
        """
        return Session()

    @property
    def weights(self) -> Any:
        """`model.weights.of(module)` has copies of a module's weights, wherever these are."""
        own = getattr(self.module, "weights", None)  # which wins
        if isinstance(own, nn.Module):
            return self._child("weights")
        return Weights(self) if own is None else own

    # -- lasting edits --------------------------------------------------------------------------

    @overload
    def edit(self: M, function: None = None, *, inplace: bool = False) -> Editing[M]: ...
    @overload
    def edit(self: M, function: Callable[[Any], object], *, inplace: bool = False) -> M: ...
    def edit(
        self: M, function: Callable[[Any], object] | None = None, *, inplace: bool = False
    ) -> Editing[M] | M:
        """`with model.edit() as edited:` keeps the block: it runs in every run of `edited`.

        `edited` shares the weights of this model, has its earlier edits too, and is what the
        block edits; this model stays as it is, unless `inplace=True`. The edits are made in every
        trace, every step of every generation, and every call `edited(x)`, before the blocks of
        the trace; caches see the edited values. In the block, as in a trace, `.output` is the
        module's first call in a step, and within it models have no edits.

        The block uses the names around it as they are now: binding them anew later does not change
        the edit. What it binds is not handed back. Instead of a block, `edit(function)` takes a
        function of the model, and returns `edited`.
        """
        edited = self if inplace else self._with(self._edits[:], self._functions[:])
        if function is not None:
            edited._edits.append(of_function(function, self._with([])))
            return edited
        return Editing(edited, edited._edits, _without_edits)

    @property
    def edits(self) -> Edits:
        """The lasting edits, in order: to look at, remove, save to a file, and load from one."""
        return Edits(self._with([]), self._edits)

    def _with(self: M, edits: list[Edit], functions: Sequence[Hooked] = ()) -> M:
        """This model with other edits; the two share all else."""
        other = copy.copy(self)
        object.__setattr__(other, "_edits", edits)
        object.__setattr__(other, "_functions", list(functions))
        return other

    @property
    def _is_edited(self) -> bool:
        return bool(self._edits) or any(each.is_on for each in self._functions)

    def _interventions(self) -> list[Intervention]:
        self._functions[:] = [each for each in self._functions if each.is_on]
        hooks = [calling(self._functions)] if self._functions else []
        return [*hooks, *(edit.intervention() for edit in self._edits)]

    def _tracer(
        self,
        call: TracedCall | Batch,
        grad: bool | None = None,
        tree: Tree | None = None,
        verify: Wanted | None = None,
    ) -> Tracer:
        tree = tree or self._tree
        verifier = None if verify is None else Verifier(tree, verify, self._tell)
        return Tracer(tree, call, grad, self._interventions(), verifier)

    def _sent(
        self,
        host: Host,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        start_at_layer: int | None = None,
        verify: object = False,
    ) -> Tracer:
        """The tracer of a run on a host."""
        more = {"start_at_layer": start_at_layer, "verify": verify}
        chosen = {name: it for name, it in more.items() if it is not None and it is not False}
        given = {**kwargs, **chosen}
        return Tracer(self._tree, Sent(host, self, method, args, given))

    @property
    def _tell(self) -> Callable[[Sequence[int]], Sequence[str]] | None:
        """From token ids, the text of each; None where nothing knows."""
        return None

    def _edited(self, call: TracedCall, grad: bool | None = None) -> Any:
        return run_edited(self._tree, call, grad, self._interventions())

    def __repr__(self) -> str:
        return repr(self.module)


def _without_edits(value: object) -> object:
    """A model without its edits, as an edit that held them would keep itself alive."""
    return value._with([]) if isinstance(value, Model) else value  # pyright: ignore[reportPrivateUsage] - same file
