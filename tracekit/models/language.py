"""A LanguageModel is a Hugging Face model with its tokenizer, ready to trace and to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracekit.capture import caller_frame, is_with_item, showing_own_lines
from tracekit.core.renames import Rename
from tracekit.core.tree import Tree
from tracekit.errors import InputError, LoadingError
from tracekit.models import inputs as feeding
from tracekit.models import loading
from tracekit.models.answering import Answering
from tracekit.models.batching import Batch, Padded, is_without_input
from tracekit.models.behind import (
    behind,
    generate_behind,
    goes_on,
    names_of,
    run_behind,
    run_dry_behind,
)
from tracekit.models.fresh import config_of, fresh_model, refuse_to_run
from tracekit.models.generate_options import refuse_in_header, translated
from tracekit.models.generation import generate
from tracekit.models.lengths import count_steps
from tracekit.models.options import check_options
from tracekit.models.padding import fit_padding
from tracekit.models.prefill import beginning, extended, prefill
from tracekit.models.prefix import Prefix
from tracekit.models.prefix_files import load_prefix
from tracekit.models.returned import Returning, wanted_of
from tracekit.models.scanning import fake_twin
from tracekit.models.signatures import accepts
from tracekit.models.texts import Texts, is_list_of_texts
from tracekit.models.verification import refuse_generation, verified_as
from tracekit.models.weights import WithWeights
from tracekit.tracing.call import TracedCall
from tracekit.tracing.elsewhere import Host, called_on
from tracekit.tracing.tracer import Tracer


class LanguageModel(Answering, WithWeights):
    """A Hugging Face model, by Hub id, by directory, packaged (`"tracekit/tiny"`), or live.

    `device` is where all of it is put (default: the CPU). `dtype` (default: the checkpoint's),
    `device_map`, `revision`, `quantization_config`, `attn_implementation` and all else go to
    `from_pretrained`. `dispatch=False` leaves the weights out until they are needed.
    Batches of different lengths are padded on `padding_side` ("left" for decoders, else
    "right"), with positions such that every row is computed as it would be alone.
    """

    __slots__ = ("_empty_from", "_processing")

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Any = None,
        dispatch: bool = True,
        padding_side: str | None = None,
        name: str = "model",
        rename: Rename | None = None,
        **options: Any,
    ) -> None:
        is_live = isinstance(model, nn.Module)
        if is_live and options:
            raise LoadingError(f"a live model takes no loading options: {', '.join(options)}.")
        if not is_live:
            loading.check_options(model, options)
        if is_live:
            module: Any = model
        elif dispatch:
            module = loading.load_model(model, **options)
        else:
            module = loading.load_empty(model, **options)
        super().__init__(module, name, rename=rename)
        if tokenizer is None and not is_live:
            tokenizer = loading.load_tokenizer(model, **options)
        elif isinstance(tokenizer, (str, Path)):
            tokenizer = loading.load_tokenizer(tokenizer)
        elif tokenizer is not None:
            tokenizer = loading.with_padding(tokenizer)
        empty_from = None if is_live or dispatch else (model, options)
        object.__setattr__(self, "_tokenizer", tokenizer)
        object.__setattr__(self, "_padding_side", padding_side)
        object.__setattr__(self, "_empty_from", empty_from)
        object.__setattr__(self, "_processing", {})
        if empty_from is not None:
            self._tree.load_first = self.dispatch

    @classmethod
    @showing_own_lines
    def from_config(
        cls,
        config: Any,
        *,
        tokenizer: Any = None,
        seed: int | None = 0,
        dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        padding_side: str | None = None,
        name: str = "model",
        rename: Rename | None = None,
        **overrides: Any,
    ) -> LanguageModel:
        """A model with random weights, made of its configuration alone: nothing is downloaded.

        `config` is one of transformers, a mapping with "model_type", a directory with config.json,
        or the name of a family: `from_config("llama")` is a small one, 64 wide, of 2 layers.
        `overrides` set values of it. The same seed gives the same weights, and the random numbers
        of the user stay as they were; `seed=None` takes those. `device="meta"`: no weights at all,
        for modules and shapes.
        """
        if isinstance(tokenizer, (str, Path)):
            tokenizer = loading.load_tokenizer(tokenizer)
        tokenizer = None if tokenizer is None else loading.with_padding(tokenizer)
        found, is_small = config_of(config, overrides, tokenizer)
        module = fresh_model(found, is_small, seed, dtype, device, attn_implementation)
        model = cls(
            module, tokenizer=tokenizer, padding_side=padding_side, name=name, rename=rename
        )
        if any(weight.is_meta for weight in module.parameters()):
            model._tree.load_first = refuse_to_run
        return model

    def dispatch(self) -> None:
        """Load the weights now, if they were left out. Envoys made before stay valid."""
        if self._tree.load_first is None:  # nothing was left out, or a copy has brought it
            return
        if self._empty_from is None:  # there is nothing to load: it says why
            self._tree.load_first()
        name, options = self._empty_from
        loaded = loading.load_model(name, **options)
        if set(options) & loading.CHANGES_MODULES:
            self._tree.replace_root(loaded)
        else:
            loading.bring_weights(self._tree.root, loaded)
        self._tree.load_first = None

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

        `input` is a string, a list of strings, the messages of a conversation, token ids, or an
        encoding; `prepend_bos`, `append_eos` and `padding_side` say how text becomes tokens (None:
        as the tokenizer and the model do), and all other keyword arguments go to the model's
        forward. No keys and values are kept unless `use_cache=True` says so.
        Without input, each `with tracer.invoke(input):` in the block has rows of its own.
        With `prefix=model.prefill(prompt)` the pass is of `input` alone, behind that prompt; with
        `start_at_layer=k`, `input` is the residual stream there, and nothing before is computed.
        `verify=True`: `tracer.report` says what each edit did. `on=host`: see tracekit.distributed.
        Raises InputError for what is no input, PaddingError for a padded batch in which a row would
        not be what it is alone.
        """
        if on is not None:
            return self._sent(on, "trace", args, kwargs, start_at_layer, verify)
        if start_at_layer is not None:
            return super().trace(*args, start_at_layer=start_at_layer, verify=verify, **kwargs)
        wanted = verified_as(verify, kwargs)
        if is_without_input(args, kwargs):
            return self._tracer(self._batch(kwargs, run_behind, "trace"), verify=wanted)
        return self._tracer(self._pass(args, kwargs), verify=wanted)

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
        inputs = self._completed(self._prepared(args, kwargs), for_generate=False)
        return self._forward(inputs)

    def _begin_with(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.dispatch()
        prefix = inputs.pop("prefix", None)
        return self._completed(self._fitted(inputs, prefix, False), for_generate=False)

    @showing_own_lines
    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """`with model.scan(input) as tracer:` is a dry run of what `trace(input)` would do.

        The same block, on fake tensors: shapes, dtypes, devices, the order of modules and whether
        edits fit, each error at its line. It computes nothing, and loads no weights that were left
        out. What it binds stays fake: whoever asks it for numbers gets a DryRunError.
        """
        if is_without_input(args, kwargs):
            twin = fake_twin(self._tree)
            return self._tracer(self._batch(kwargs, run_dry_behind, "trace", twin), tree=twin)
        prepared = self._prepared(args, kwargs, is_dry=True)
        inputs = self._completed(prepared, for_generate=False)
        twin = fake_twin(self._tree)
        return self._tracer(TracedCall(lambda _: run_dry_behind(twin, _, (), inputs)), tree=twin)

    @showing_own_lines
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate from `input`; as the header of a `with`, trace all its steps.

        `with model.generate(prompt, max_new_tokens=8) as tracer:` has one step for each new
        token, and `tracer.result` is the tokens; anywhere else the tokens are returned. Takes
        everything that `transformers.generate` takes, with its defaults.
        With `prefix=model.prefill(prompt)` it goes on from that prompt and `input` behind it.

        `prepend_bos`, `append_eos` and `padding_side` say, as for `trace`, how text becomes tokens.
        `freq_penalty` takes that much off a token's logit for each time it has come (before the
        temperature is applied). `temperature=0` is greedy; `stop_at_eos=False` never stops at a
        token. `stop_strings` need no tokenizer, `output_logits=True` no return_dict_in_generate.
        `stopping_criteria` may be a single one. `use_past_kv_cache` is `use_cache`, and
        `verbose` is `progress`, which shows a bar.

        Not as a header: `return_type` is "tokens", "str", or "input" (text for text).
        `return_input_tokens=True` returns `(output, input_tokens)`. `return_cache=True` returns
        `(output, cache)`, or `(output, cache, input_tokens)`: the cache of one forward pass over
        the whole output, the last token too, with the lasting edits of the model made in it.
        `names_filter` takes what `tracer.cache` takes, or a predicate of the name alone;
        `device` is where tensors are put as they are recorded (None: they stay). Rows with padding
        in front, or with padding behind their end, are computed as each would be alone; at padding
        itself the cache holds what the model makes of it. What generation alone does, as
        `logits_processor` or guidance, is not in that pass; nor is an edit of the embedding of
        new tokens made in it, where `inputs_embeds` were given.
        """
        if is_with_item(caller_frame()):
            return self.generation(*args, **kwargs)
        if kwargs.get("on") is not None:
            return called_on(self, "generate", args, kwargs)
        refuse_generation(kwargs)
        wanted, rest = wanted_of(kwargs)
        if wanted.is_plain:
            return super().generate(*args, **rest)
        self._check_generates()
        inputs = self._inputs_of_generation(args, rest)
        source = args[0] if args else None
        returning = Returning(wanted, self._tree, self.tokenizer, source, inputs)
        output = self._made(self._generation_of(returning.arguments()))
        return returning.handed_back(output, self._cache_of(returning, output))

    @showing_own_lines
    def generation(self, *args: Any, **kwargs: Any) -> Tracer:
        """The tracer of `with model.generate(...)`, wherever it stands.

        For an ExitStack, or to run a function: `model.generation(x, ...).run(function)`.
        """
        refuse_in_header(kwargs)
        return super().generation(*args, **kwargs)

    @showing_own_lines
    def prefill(self, *args: Any, **kwargs: Any) -> Prefix:
        """Run a prompt once, and keep its keys and values for the runs that begin with it.

        Takes what `trace` takes; of an encoder-decoder the source, and `decoder_input_ids=`. The
        lasting edits are made, there are no gradients. UnsupportedError for a model that can't go
        on from what it kept.
        """
        inputs = self._completed(self._prepared(args, kwargs), for_generate=False)
        self._warn_of_an_end(args[0] if args else None, kwargs)
        inputs.pop("use_cache", None)
        inputs |= {name: kwargs[name] for name in ("use_cache",) if name in kwargs}
        return prefill(self, self._tree, inputs, self._run_apart)

    @showing_own_lines
    def load_prefix(self, path: str | Path) -> Prefix:
        """The prefix that `prefix.save(path)` wrote; LoadingError if it is of another model."""
        self.dispatch()
        return load_prefix(self, path)

    def _extended(self, prefix: Prefix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prefix:
        inputs = self._prepared(args, {**kwargs, "prefix": prefix})
        return extended(prefix, self._completed(inputs, for_generate=False), self._run_apart)

    def _run_apart(self, inputs: dict[str, Any]) -> Any:
        """The outputs of a forward pass with the lasting edits, and no gradients."""
        with torch.inference_mode(False), torch.no_grad():
            call = TracedCall(lambda it: run_behind(self._tree, beginning(it), (), inputs))
            return self._edited(call, grad=False) if self._is_edited else call.make(None)

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        inputs = self._completed(self._prepared(args, kwargs), for_generate=False)
        call = self._forward(inputs)
        return inputs, self._edited(call) if self._is_edited else call.make(None)

    def _forward(self, inputs: dict[str, Any]) -> TracedCall:
        return TracedCall(lambda follower: run_behind(self._tree, follower, (), inputs))

    def _generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
        return self._generation_of(self._inputs_of_generation(args, kwargs))

    def _generation_of(self, inputs: dict[str, Any]) -> TracedCall:
        count = partial(count_steps, self._tree.root, (), inputs)
        return TracedCall(lambda follower: generate_behind(self._tree, follower, (), inputs), count)

    def _inputs_of_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        prepared = self._prepared(args, kwargs, for_generate=True)
        return self._completed(prepared, for_generate=True)

    def _cache_of(self, returning: Returning, output: Any) -> Any:
        inputs = returning.of_pass(output)
        if inputs is None:  # no cache is wanted
            return None
        call = TracedCall(lambda it: run_behind(self._tree, returning.told(it), (), inputs))
        return self._tracer(call, grad=False).run(returning.record)

    def _texts(
        self, args: tuple[Any, ...], return_type: str | None, skip_special_tokens: bool
    ) -> Texts | None:
        if self.tokenizer is None:
            return super()._texts(args, return_type, skip_special_tokens)
        if return_type not in (None, "str", "tokens"):
            raise InputError(
                f"return_type= of a stream is 'str' (the default) or 'tokens', not {return_type!r}."
            )
        if return_type == "tokens":
            return None
        is_listed = bool(args) and is_list_of_texts(args[0])
        return Texts(self.tokenizer, is_listed=is_listed, skip_special_tokens=skip_special_tokens)

    @showing_own_lines
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on tensors as PyTorch would, or on text, with its lasting edits.

        With `return_type=` it is `forward`.
        """
        if "return_type" in kwargs:
            return self.forward(*args, **kwargs)
        self.dispatch()
        if (args and not isinstance(args[0], torch.Tensor)) or kwargs.get("prefix") is not None:
            args, kwargs = (), self._prepared(args, kwargs)
        if self._is_edited or "prefix" in kwargs:
            call = TracedCall(lambda follower: run_behind(self._tree, follower, args, kwargs))
            return self._edited(call) if self._is_edited else call.make(None)
        with self._tree.guard():
            return self.module(*args, **kwargs)

    def _prepared(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        for_generate: bool = False,
        is_dry: bool = False,
    ) -> dict[str, Any]:
        if len(args) > 1:
            raise InputError(
                f"one input at a time: a list makes a batch, and {len(args)} inputs were given."
            )
        if not args and not kwargs:
            raise InputError("an input is needed: a string, a list of strings, or token ids.")
        if not is_dry:
            self.dispatch()
        given = {name: value for name, value in kwargs.items() if name != "prefix"}
        prefix = kwargs.get("prefix")
        inputs = self._read(args, given, is_rest=goes_on(prefix), is_prompt=for_generate)
        return self._fitted(inputs, prefix, for_generate)

    def _fitted(self, inputs: dict[str, Any], prefix: Any, for_generate: bool) -> dict[str, Any]:
        if prefix is None:
            return fit_padding(inputs, self._tree.root, for_generate)
        return behind(self, prefix, inputs, for_generate)

    def _completed(self, inputs: dict[str, Any], for_generate: bool) -> dict[str, Any]:
        """`inputs`, and what else a traced call is told."""
        module: Any = self._tree.root
        if not for_generate:
            check_options(module, names_of(inputs))
            if accepts(module, "use_cache") and inputs.get("past_key_values") is None:
                inputs.setdefault("use_cache", False)
        elif self.tokenizer is not None and module.generation_config.pad_token_id is None:
            inputs.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        return translated(module, inputs, self.tokenizer) if for_generate else inputs

    def _batch(
        self, shared: dict[str, Any], call: Callable[..., Any], kind: str, twin: Tree | None = None
    ) -> Batch:
        reading, shared = feeding.reading_of(shared)
        prefix = shared.pop("prefix", None)
        call = generate_behind if call is generate else call

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            merged, is_rest = {**reading, **kwargs}, goes_on(prefix)
            return self._read(args, merged, is_rest, is_prompt=kind == "generate")

        def fitted(inputs: dict[str, Any]) -> dict[str, Any]:
            for_generate = kind == "generate"
            inputs = self._fitted({**inputs, **shared}, prefix, for_generate)
            return self._completed(inputs, for_generate)

        if twin is None:
            self.dispatch()
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        padded = Padded(read, fitted, pad, self._side(reading))
        return Batch(padded, twin or self._tree, call, kind)
