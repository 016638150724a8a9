"""Every error and warning: what was asked, what happened, what to write instead, and a slug."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class TracekitError(Exception):
    """The root of all errors; its text ends in `[slug]`, which is stable across releases."""

    slug: ClassVar[str] = "tracekit"

    def __str__(self) -> str:
        return f"{super().__str__()} [{self.slug}]"


class CaptureError(TracekitError):
    """A block cannot be lifted out of its place, or does other things than its source said."""

    slug = "capture"


class OutsideTraceError(TracekitError):
    """A value was asked for where no model is running for it."""

    slug = "outside-trace"


class UnknownModuleError(TracekitError, AttributeError):
    """A name or path that the model does not have."""

    slug = "unknown-module"


class UnknownPathError(TracekitError, KeyError):
    """A path that a model or a Cache does not have."""

    slug = "unknown-path"

    def __str__(self) -> str:  # KeyError would print the repr of the text
        return f"{self.args[0]} [{self.slug}]"


class MissingNameError(UnknownModuleError):
    """A standard name that this architecture, or this layer of it, has nothing for."""

    slug = "missing-name"


class AliasError(TracekitError, ValueError):
    """Another name for a module that can't be one, or a name for what there is not."""

    slug = "alias"


class AttentionError(TracekitError, AttributeError):
    """The values inside an attention that computes them in a way that can't be tapped."""

    slug = "attention"


class UnknownOperationError(TracekitError, AttributeError):
    """A name that is no operation of a function's source."""

    slug = "unknown-operation"


class SourceError(TracekitError):
    """The operations of a function cannot be listed or reached."""

    slug = "source"


class SiteOrderError(TracekitError):
    """A value was asked for after the model had passed it."""

    slug = "site-order"


class NeverRanError(TracekitError):
    """A value was asked for, or an edit made, at a module that did not run."""

    slug = "never-ran"


class NeverCameError(TracekitError):
    """A block waited for another block of its trace, in vain."""

    slug = "never-came"


class LaterBlockError(TracekitError, NameError):
    """A block read a name that only a block behind it binds."""

    slug = "later-block"


class StepError(TracekitError):
    """A step was asked for that did not happen, or that cannot be named this way."""

    slug = "step"


class StreamError(TracekitError):
    """A stream was asked for what it does not have, or not at this time."""

    slug = "stream"


class MisfitError(TracekitError):
    """A written value does not fit the place of the one it replaces."""

    slug = "misfit"


class OverwrittenError(TracekitError):
    """A captured tensor was overwritten in place later, so it is no longer the captured value."""

    slug = "overwritten"


class OffloadError(TracekitError):
    """Recorded values did not come from an accelerator to the host."""

    slug = "offload"


class GradientError(TracekitError):
    """A gradient was asked for that no backward pass can bring."""

    slug = "gradient"


class CacheError(TracekitError):
    """A cache was asked for something that it does not hold or cannot record."""

    slug = "cache"


class InputError(TracekitError, ValueError):
    """The input of a trace is missing, or of a kind that the model cannot take."""

    slug = "input"


class PaddingError(InputError):
    """A padded batch that this model would compute differently from its rows alone."""

    slug = "padding"


class TokenError(InputError):
    """A text that is not one token, or a token that is not where it was looked for."""

    slug = "token"


class RowsError(TracekitError):
    """A value can't be divided into the rows of each invoke."""

    slug = "rows"


class RankError(TracekitError):
    """The ranks of a sharded model do not run the same block, or do not write the same values."""

    slug = "ranks"


class DryRunError(TracekitError):
    """The numbers of a tensor were asked for in a dry run, which computes none."""

    slug = "dry-run"


class UnsupportedError(TracekitError):
    """What was asked cannot be done rightly here."""

    slug = "unsupported"


class LostError(UnsupportedError):
    """An edit of something that the model does not read again, so that it would change nothing."""

    slug = "lost"


class LoadingError(TracekitError):
    """A model or its tokenizer cannot be loaded from what was given."""

    slug = "loading"


class StorageError(TracekitError):
    """A file of activations is damaged, or is not of what was asked for."""

    slug = "storage"


class OffloadedError(LoadingError):
    """The numbers of a weight were asked for, or computed with, that are not in memory."""

    slug = "offloaded"


class SettingError(TracekitError, AttributeError):
    """A setting that there is not, or a value that it cannot have."""

    slug = "setting"


class TracekitWarning(UserWarning):
    """Something is probably not what was meant, and the numbers are right all the same."""


class ShortLoopWarning(TracekitWarning):
    """A bounded loop over steps ended early because the generation did."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the nearest known names, or nothing."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(match) for match in near) + "?"
