"""For tests of whoever works with models: what is not so fails them."""

from __future__ import annotations

from tracekit.testing.edits import assert_edit
from tracekit.testing.ranks import RankReport, assert_tp_equal, save_tp_reference

__all__ = ["RankReport", "assert_edit", "assert_tp_equal", "save_tp_reference"]
