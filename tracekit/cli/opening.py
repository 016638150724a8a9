"""Open the model that a command line names, without a word of transformers in the output."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from tracekit.errors import InputError, UnsupportedError
from tracekit.models import loading
from tracekit.models.language import LanguageModel


def open_model(options: Namespace, **more: Any) -> LanguageModel:
    """The model of the command line, on its device; InputError for a device that is not there."""
    given = {"dtype": options.dtype, "revision": options.revision, **more}
    if options.device is not None:
        given["device"] = device(options.device)
    if options.trust_remote_code:
        given["trust_remote_code"] = True
    if options.offline:
        given["local_files_only"] = True
    chosen = {name: value for name, value in given.items() if value is not None}
    return LanguageModel(options.model, **chosen)


def open_decoder(options: Namespace) -> LanguageModel:
    """The model, which goes on from text; UnsupportedError for one that reads two texts."""
    model = open_model(options)
    if getattr(model.module.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{options.model} is an encoder-decoder, which reads tokens beside the text that the "
            f"command line gives: use tracekit.analysis in Python, with decoder_input_ids."
        )
    return model


def open_outside(options: Namespace) -> LanguageModel:
    """The model without weights and tokenizer: modules and shapes, by its configuration alone."""
    given: dict[str, Any] = {"revision": options.revision, "dtype": options.dtype}
    if options.trust_remote_code:
        given["trust_remote_code"] = True
    if options.offline:
        given["local_files_only"] = True
    chosen = {name: value for name, value in given.items() if value is not None}
    loading.check_options(options.model, chosen)
    return LanguageModel(loading.load_empty(options.model, **chosen))


def device(name: str) -> torch.device:
    """The device of that name; InputError if this machine has none."""
    try:
        found = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"--device {name}: no device is called so; cpu, cuda, cuda:1, mps."
        ) from None
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if found.type in count and (found.index or 0) >= count[found.type]:
        raise InputError(
            f"--device {name}: PyTorch {torch.__version__} sees {count[found.type] or 'no'} "
            f"{found.type} devices here (`tracekit doctor` shows what it sees)."
        )
    return found


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bars and no advice from transformers, and all of it as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
