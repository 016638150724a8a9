"""For tests of whoever edits models: an edit that does not do what it should fails them."""

from __future__ import annotations

from typing import Any

from tracekit.models.model import Model
from tracekit.tracing.verified.report import EditReport


def assert_edit(model: Model, edit: object, *args: Any, **kwargs: Any) -> EditReport:
    """The report of `model.verify(edit, ...)`; AssertionError, with its text, if it is not true.

    Takes what `model.verify` takes: `assert_edit(model, edit, prompt, positions=[3], rows=[0])`.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    report = model.verify(edit, *args, **kwargs)
    if not report:
        raise AssertionError(repr(report))
    return report
