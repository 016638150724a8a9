"""Find and load a Hugging Face model and its tokenizer: by Hub id, directory, or packaged."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tracekit.capture import warn_user
from tracekit.errors import LoadingError, did_you_mean
from tracekit.models.tiny import WEIGHTS

PACKAGED = {"tracekit/tiny": WEIGHTS}

# What a language model's config may be built as, best first: the class that the checkpoint names,
# else the first of these families that knows the config.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def resolve(name: str | Path) -> str:
    """The directory of a packaged model, else `name` itself: a local directory or a Hub id."""
    packaged = PACKAGED.get(str(name))
    if packaged is None and str(name).startswith("tracekit/") and not Path(name).exists():
        raise LoadingError(
            f"{str(name)!r} is not packaged with tracekit{did_you_mean(str(name), PACKAGED)}"
        )
    return str(packaged) if packaged is not None else str(name)


def check_options(name: str | Path, options: dict[str, Any]) -> None:
    """LoadingError for options that contradict each other, or would say nothing."""
    both = [each for each in ("device_map", "tp_plan") if options.get(each) is not None]
    device = options.get("device")
    if device is not None and both:
        raise LoadingError(
            f"device= puts the whole model on one device, and {both[0]}= its parts on several: "
            f"give one of them."
        )
    if device is not None and torch.device(device).type == "meta":
        raise LoadingError(
            "device='meta' would leave the weights out for good: dispatch=False leaves them out "
            "until they are needed, and LanguageModel.from_config(name, device='meta') for good."
        )
    if options.get("revision") is not None and Path(resolve(name)).is_dir():
        raise LoadingError(
            f"revision= is one of a repository of the Hub, and {str(name)!r} is a directory, of "
            f"which there is one: leave it out."
        )


def load_model(name: str | Path, *, device: Any = None, **options: Any) -> Any:
    """The model with its weights, in evaluation mode. `options` go to `from_pretrained`."""
    config = _config_of(name, options)
    if device is not None:
        options["device_map"] = {"": device}
    model, report = _load(auto_class(config), name, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        warn_user(
            f"{str(name)!r} has no weights for {', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''}: they are random."
        )
    return model.eval()


def load_empty(name: str | Path, **options: Any) -> Any:
    """The model with its weights on meta: shapes and modules, and no memory."""
    import accelerate
    import transformers

    config = _config_of(name, options)
    allowed = {key: options[key] for key in ("dtype", "attn_implementation") if key in options}
    if allowed.get("dtype") == "auto":
        del allowed["dtype"]  # which it is, is known when the weights come
    with accelerate.init_empty_weights():
        model: Any = auto_class(config).from_config(config, **allowed)
    model.tie_weights()  # leaving out each one has parted those that are one
    if model.can_generate():
        with suppress(OSError):  # a checkpoint may come without one
            found = transformers.GenerationConfig.from_pretrained(resolve(name))
            model.generation_config = found
    return model.eval()


def bring_weights(empty: nn.Module, loaded: nn.Module) -> None:
    """Put the weights of `loaded` into the modules of `empty`, which stay the objects they are.

    What was done to them meanwhile stays: other modules in their place, hooks, modes, a dtype.
    """
    own, others = dict(empty.named_modules()), dict(loaded.named_modules())
    brought: dict[int, Any] = {}  # tied weights stay tied
    for path, module in own.items():
        other = others.get(path)
        if type(other) is not type(module):
            continue
        for kind in ("_parameters", "_buffers"):
            mine, theirs = getattr(module, kind), getattr(other, kind)
            for name, tensor in mine.items():
                if tensor is not None and theirs.get(name) is not None:
                    mine[name] = brought.setdefault(
                        id(theirs[name]), _as_was_asked(theirs[name], tensor)
                    )


def _as_was_asked(loaded: Any, empty: Any) -> Any:
    """`loaded`, in the dtype that `empty` was given in between, if it was given one."""
    if loaded.dtype == empty.dtype or not loaded.is_floating_point():
        return loaded
    cast = loaded.detach().to(empty.dtype)
    return nn.Parameter(cast, loaded.requires_grad) if isinstance(loaded, nn.Parameter) else cast


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """The tokenizer; one without a padding token pads with its end-of-sequence token."""
    import transformers

    return with_padding(_load(transformers.AutoTokenizer, name, **_config_options(options)))


def with_padding(tokenizer: Any) -> Any:
    """`tokenizer`, able to pad; the mask hides padding, so which token it is does not matter."""
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)  # the user's own stays as it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    return tokenizer


# With these, modules are not what their class alone makes them: they are taken over whole.
CHANGES_MODULES = frozenset({"device_map", "quantization_config", "tp_plan", "load_in_8bit"})

# Loading options that a configuration would take for values of its own.
_NOT_OF_CONFIG = frozenset({"dtype", "torch_dtype", "attn_implementation", "quantization_config"})

_CONFIG_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
    "subfolder",
)


def _config_options(options: dict[str, Any]) -> dict[str, Any]:
    """Of the loading options, those that say where the files are."""
    return {key: options[key] for key in _CONFIG_OPTIONS if key in options}


def _config_of(name: str | Path, options: dict[str, Any]) -> Any:
    """The configuration that is given, else the one of the files, with what is set anew in it."""
    import transformers

    if options.get("config") is not None:
        return options["config"]
    changes = {key: options[key] for key in options if key not in _NOT_OF_CONFIG}
    config, _ = _load(transformers.AutoConfig, name, return_unused_kwargs=True, **changes)
    return config


def _load(loader: Any, name: str | Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(resolve(name), **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise LoadingError(
            f"{str(name)!r} can't be loaded by {loader.__name__}: {_first_line(error)}; options go "
            f"to from_pretrained, as dtype= and device_map= do."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadingError(
            f"{str(name)!r} can't be loaded by {loader.__name__}: {_first_line(error)} Give a "
            f"Hub id, a directory with config.json, 'tracekit/tiny', or a live model."
        ) from error


def auto_class(config: Any) -> Any:
    """What makes a model of `config`, with its weights or without."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and hasattr(found, "_from_config"):
            return _Named(found)
    for name in _in_order(config):
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    raise LoadingError(f"transformers has no model class for {type(config).__name__}.")


def _in_order(config: Any) -> tuple[str, ...]:
    """The families, best first: an encoder has a class with the head of a decoder, too."""
    if getattr(config, "is_encoder_decoder", False):
        return ("AutoModelForSeq2SeqLM", *_AUTO_CLASSES)
    if getattr(config, "is_decoder", False):
        return _AUTO_CLASSES
    return ("AutoModelForMaskedLM", *_AUTO_CLASSES)


class _Named:
    """A concrete model class with the two constructors of an Auto class."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls
        self.__name__ = cls.__name__

    def from_pretrained(self, name: str, **options: Any) -> Any:
        return self._cls.from_pretrained(name, **options)

    def from_config(self, config: Any, **options: Any) -> Any:
        return self._cls._from_config(config, **options)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
