"""Texts with classes: every source through one function, and texts that every Python carries."""

from __future__ import annotations

import json

import datasets
import pytest

from studies.language_models.texts import PACKAGES, load_texts, standard_library

ROWS = {"text": ["one", "two", "three", "four"], "label": ["b", "a", "b", "c"]}


def test_columns_in_memory():
    texts = load_texts(ROWS)
    assert texts.texts == ROWS["text"] and texts.names == ["a", "b", "c"]
    assert [texts.names[c] for c in texts.classes] == ROWS["label"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_local_file_gives_what_memory_gives(tmp_path, ending):
    path, data = tmp_path / f"own.{ending}", datasets.Dataset.from_dict(ROWS)
    {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[ending](path)
    texts, expected = load_texts(path), load_texts(ROWS)
    assert (texts.texts, list(texts.classes), texts.names) == (expected.texts, expected.classes, expected.names)
    assert load_texts(str(path)).texts == expected.texts


def test_names_of_a_data_set_stay_in_its_order(tmp_path):
    label = datasets.ClassLabel(names=["z", "y", "x"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    path = tmp_path / "named.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"], "label": [2, 0]}, features=features).to_parquet(path)
    texts = load_texts(path)
    assert texts.names == ["z", "y", "x"] and list(texts.classes) == [2, 0]


def test_other_columns_can_be_named():
    texts = load_texts({"instruction": ["do"], "category": ["qa"]}, text="instruction", label="category")
    assert (texts.texts, texts.names) == (["do"], ["qa"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: {"text": ["one"]}, ["in memory", "no column 'label'", "text"]),
        (lambda p: {"text": [], "label": []}, ["in memory", "no rows"]),
        (lambda p: {"text": ["one", "two"], "label": ["a", None]}, ["row 1", "no 'label'"]),
        (lambda p: p / "none.csv", ["none.csv", "not a file", "in memory"]),
        (lambda p: p, ["not a file", "in memory"]),
        (lambda p: p / "broken.jsonl", ["broken.jsonl", "cannot be loaded", "in memory"]),
        (lambda p: "nobody/nothing-of-this-name", ["nobody/nothing-of-this-name", "cannot be loaded", "in memory"]),
    ],
)
def test_one_line_says_what_is_wrong_and_what_to_give_instead(tmp_path, make, words):
    (tmp_path / "broken.jsonl").write_text(json.dumps({"text": "one"})[:-3])
    with pytest.raises(ValueError) as error:
        load_texts(make(tmp_path))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_the_standard_library_gives_the_same_texts_again_none_twice():
    texts, again = standard_library(), standard_library()
    assert texts == again and len(set(texts.texts)) == len(texts.texts)
    assert len(texts.names) == len(PACKAGES)
    assert min(map(list(texts.classes).count, range(len(PACKAGES)))) >= 350  # what the paper profile needs of a class
    assert not any("import unittest" in text for text in texts.texts[:500])


def test_texts_are_of_their_package():
    texts = standard_library(["asyncio", "ipaddress"])
    both = {name: " ".join(t for t, c in zip(texts.texts, texts.classes, strict=True) if texts.names[c] == name)
            for name in texts.names}
    assert both["asyncio"].count("await ") > 50 and both["ipaddress"].count("await ") == 0
    assert both["ipaddress"].count("netmask") > 20 > both["asyncio"].count("netmask")
