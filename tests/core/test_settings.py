"""Settings are plain attributes with checked names, and can be changed for a while."""

from __future__ import annotations

import copy

import pytest

from tracekit import settings
from tracekit.errors import SettingError


def test_a_setting_is_changed_for_the_length_of_a_with() -> None:
    assert settings.lift_blocks is True
    with settings.changed(lift_blocks=False, defer_reads=False):
        assert (settings.lift_blocks, settings.defer_reads) == (False, False)
        with settings.changed(lift_blocks=True):
            assert settings.lift_blocks is True
        assert settings.lift_blocks is False
    assert (settings.lift_blocks, settings.defer_reads) == (True, True)


def test_a_change_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        with settings.changed(defer_reads=False):
            1 / 0
    assert settings.defer_reads is True


def test_what_is_no_setting_or_no_value_of_one_is_refused_and_changes_nothing() -> None:
    with pytest.raises(SettingError, match="did you mean 'defer_reads'"):
        settings.defer_read
    with pytest.raises(SettingError, match="did you mean 'lift_blocks'"):
        with settings.changed(defer_reads=False, lift_block=False):
            pass
    with pytest.raises(SettingError, match="True or False, not 0"):
        with settings.changed(defer_reads=False, lift_blocks=0):  # type: ignore[arg-type]
            pass
    for size in (-1, True, 1.5, "256 MB"):
        with pytest.raises(SettingError, match="a number of bytes, or 0, not"):
            settings.offload_bytes = size  # type: ignore[assignment]
    shown = "settings(defer_reads=True, lift_blocks=True, offload_bytes=268435456)"
    assert repr(settings) == shown


def test_settings_can_be_copied() -> None:
    assert copy.copy(settings).lift_blocks is True
