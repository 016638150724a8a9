"""A data set in each form, as numbered documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tracekit.errors import InputError
from tracekit.harvesting.documents import Documents, digest_of

TEXTS = ["one", "two words", "three", "and four"]


def text_file(folder: Path) -> Any:
    (folder / "a.txt").write_text("one\n\ntwo words\nthree\n  \nand four\n", "utf-8")
    return str(folder / "a.txt")


def several_files(folder: Path) -> Any:
    (folder / "a.txt").write_text("one\ntwo words", "utf-8")
    rows = [json.dumps({"text": text, "id": 3}) for text in TEXTS[2:]]
    (folder / "b.jsonl").write_text("\n".join(rows), "utf-8")
    return [folder / "a.txt", folder / "b.jsonl"]


FORMS: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: TEXTS,
    "tuple": lambda _: tuple(TEXTS),
    "file": text_file,
    "files": several_files,
    "data set": lambda _: datasets.Dataset.from_dict({"id": [*range(4)], "text": TEXTS}),
    "rows": lambda _: [{"text": text} for text in TEXTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_by_number(form: str, tmp_path: Path) -> None:
    documents = Documents(FORMS[form](tmp_path))
    assert len(documents) == 4
    assert documents.between(0, 9) == TEXTS
    assert documents.between(1, 3) == TEXTS[1:3]
    assert documents.between(4, 8) == []


def test_tokens_are_rows_of_numbers() -> None:
    rows = [[5, 6, 7], [8]]
    assert Documents(rows).between(0, 2) == rows
    assert Documents([torch.tensor(row) for row in rows]).between(0, 2) == rows
    assert Documents(torch.arange(6).reshape(2, 3)).between(1, 2) == [[3, 4, 5]]
    columns = datasets.Dataset.from_dict({"input_ids": rows})
    assert Documents(columns).between(0, 2) == rows


def test_a_limit_takes_the_first_documents_of_what_has_no_length() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again"

    assert Documents(endless(), limit=3).between(0, 9) == ["again"] * 3
    assert Documents(TEXTS, limit=2).between(0, 9) == TEXTS[:2]
    with pytest.raises(InputError, match=r"a generator does not tell how many.*give limit="):
        Documents(endless())


def test_a_column_is_named_where_it_can_not_be_told() -> None:
    rows = datasets.Dataset.from_dict({"body": TEXTS})
    with pytest.raises(InputError, match="has the columns body: name the one"):
        Documents(rows).between(0, 1)
    assert Documents(rows, column="body").between(0, 9) == TEXTS


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("a text, not a file", "there is no file 'a text, not a file'"),
        (7, "a data set is a list of texts.* not int"),
        (torch.ones(3), r"tokens are \[documents, tokens\]; these are \[3\]"),
    ],
)
def test_what_is_no_data_set_is_refused(given: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Documents(given)


def test_a_document_that_is_neither_text_nor_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="document 1 is float, and not a text"):
        Documents(["fine", 0.5]).between(0, 2)


def test_digests_tell_documents_apart_and_their_order_and_borders() -> None:
    every: list[list[Any]] = [
        ["ab", "c"],
        ["a", "bc"],
        ["c", "ab"],
        ["ab"],
        [[1, 2]],
        ["[1, 2]"],
        [[12]],
    ]
    assert len({digest_of(each) for each in every}) == len(every)
    assert digest_of(["ab", "c"]) == digest_of(["ab", "c"])
