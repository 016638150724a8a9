"""The errors speak to whoever wrote the block: one class, one slug, one test of the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tracekit import errors
from tracekit.errors import TracekitError, TracekitWarning, did_you_mean

IN_ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]
ERRORS = [cls for cls in IN_ERRORS if issubclass(cls, TracekitError)]
WARNINGS = [cls for cls in IN_ERRORS if issubclass(cls, TracekitWarning)]


@dataclass(frozen=True)
class Case:
    """A mistake that a user makes, and the whole text that they read."""

    provoke: Callable[[], object]
    error: type[TracekitError]
    text: str


# One line for each class of errors.py, at least:
#     Case(lambda: model.transformer.hh, errors.UnknownModuleError, "'hh' is not in ... 'h'? [...]")
CASES: list[Case] = []


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
