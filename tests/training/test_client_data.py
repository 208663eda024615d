"""Clients' JSON-lines as tokens and labels, and what is refused, by client, file and line."""

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from clairlib.training.client_data import LONGEST, data_files, hold_out, read_client

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(20)), "user", "assistant", ":"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role + ' : ' + m.content + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
CLASSES = {"no": 0, "yes": 1}
TEXT = '{"text": "w1 w2"}'


def tokenizer(*, starts=False, chat=None):
    own = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = Whitespace()
    if starts:
        own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat
    return fast


def words(ids):
    return [WORDS[i] for i in ids]


def read(folder, *lines, own=None, name="ada", **options):
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return read_client(name, [file], own or tokenizer(), **{"max_length": 16, **options})


def one(folder, fields, **options):
    """Words of the only example, and those of them that are learnt."""
    (example,) = read(folder, json.dumps(fields), **options).examples
    ids, labels = example["input_ids"], example["labels"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    return words(ids), words(ids[labels != -100])


def test_a_text_is_learnt_whole_with_its_end(tmp_path):
    assert one(tmp_path, {"text": "w1 w2", "id": 7}) == (["w1", "w2", "</s>"],) * 2
    assert one(tmp_path, {"text": "w1 </s>"}) == (["w1", "</s>"],) * 2  # the end is there already


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path):
    pair = {"prompt": "w1 w2", "completion": " w3"}
    assert one(tmp_path, pair) == (["w1", "w2", "w3", "</s>"], ["w3", "</s>"])
    assert one(tmp_path, pair, own=tokenizer(starts=True))[1] == ["w3", "</s>"]
    # "w" + "3" is one token: it is no token of the prompt
    assert one(tmp_path, {"prompt": "w1 w", "completion": "3"}) == (["w1", "w3", "</s>"], ["w3", "</s>"])


def test_of_a_conversation_the_last_answer_is_learnt(tmp_path):
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5")]
    fields = {"messages": [{"role": role, "content": content} for role, content in turns]}
    whole, learnt = one(tmp_path, fields, own=tokenizer(chat=TEMPLATE), max_length=32)
    assert whole[:4] == ["user", ":", "w1", "</s>"] and learnt == ["w4", "w5", "</s>"]


def test_a_text_like_a_date_stays_text(tmp_path):
    """datasets' reader of JSON makes a time of it."""
    for text in ("2020-01-01", "2020-01-01T00:00:00"):
        (example,) = read(tmp_path, json.dumps({"text": text})).examples
        assert example["input_ids"].tolist() == [*tokenizer()(text)["input_ids"], 2]


def test_files_of_a_folder_blank_lines_windows_line_ends_and_byte_order_marks(tmp_path):
    folder = tmp_path / "data" / "[ada]*"  # datasets would take such a path for a pattern
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(b'{"text": "w3"}\r\n\r\n{"text": "w4"}\r\n')
    (folder / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "w1"}\n\n{"text": "w2\\u2028w2"}')
    (folder / "c.jsonl").write_bytes(b"")
    (folder / ".d.jsonl").write_bytes(b"hidden")
    (files,) = data_files(tmp_path / "data").values()
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    examples = read_client("ada", files, tokenizer(), max_length=16).examples
    assert [words(e["input_ids"])[0] for e in examples] == ["w1", "w2", "w3", "w4"]


def test_what_is_too_long_is_cut_off_and_counted(tmp_path):
    found = read(tmp_path, TEXT, json.dumps({"text": "w1 " * 40}))
    assert [len(e["input_ids"]) for e in found.examples] == [3, 16] and found.truncated == 1
    fields = json.dumps({"prompt": "w1 " * 16, "completion": "w2"})
    with pytest.raises(ValueError, match="line 2 of 'ada.jsonl' leaves nothing to learn within 16 tokens; it has 18"):
        read(tmp_path, TEXT, fields)


def test_classes_by_name_or_index(tmp_path):
    lines = [json.dumps({"text": "w1 w2", "label": label}) for label in ("yes", 0)]
    found = read(tmp_path, *lines, classes=CLASSES, max_length=1)
    assert [e["labels"].tolist() for e in found.examples] == [1, 0] and found.truncated == 2
    assert [words(e["input_ids"]) for e in found.examples] == [["w1"], ["w1"]]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{nope", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "must have one of 'text'"),
        ('{"text": "a", "prompt": "b"}', "must have one of 'text'"),
        ('{"text": null}', "has 'text' that is no string but NoneType"),
        ('{"text": 3}', "has 'text' that is no string but int"),
        ('{"text": "a\\ud800"}', "half of a surrogate pair"),
        ('{"text": ""}', "leaves nothing to learn"),
        ('{"prompt": "w1"}', "lacks 'completion'"),
        ('{"messages": "w1"}', "has 'messages' that is no list of objects"),
        ('{"messages": []}', "do not end with one of the role 'assistant'"),
        ('{"messages": [{"role": "assistant"}]}', "lacks 'content'"),
        ('{"messages": [{"role": "user", "content": "w1"}]}', "do not end with one of the role 'assistant'"),
        (
            json.dumps({"messages": [{"role": role, "content": "w1"} for role in ("system", "assistant")]}),
            "that the chat template refuses (no system)",
        ),
        (json.dumps({"text": "w1 " * (LONGEST // 3 + 1)}), "characters"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, problem):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, TEXT, "", line, TEXT, own=tokenizer(chat=TEMPLATE))
    assert str(caught.value).startswith("client 'ada': line 3 of 'ada.jsonl' ")
    assert problem in str(caught.value) and len(str(caught.value)) < 300


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(ValueError, match="line 1 .* no chat template"):
        read(tmp_path, '{"messages": []}')


@pytest.mark.parametrize("label", ['"maybe"', "2", "-1", "true", "null", "1.0", "[1]"])
def test_a_class_that_the_model_does_not_know_is_refused(tmp_path, label):
    with pytest.raises(ValueError, match="line 1 of 'ada.jsonl' has label .* knows 'no', 'yes'"):
        read(tmp_path, f'{{"text": "w1", "label": {label}}}', classes=CLASSES)


def test_a_class_is_needed(tmp_path):
    with pytest.raises(ValueError, match="lacks 'label'"):
        read(tmp_path, TEXT, classes=CLASSES)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_client_without_examples_is_refused(tmp_path, content):
    (tmp_path / "ada.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="client 'ada' has no examples: ada.jsonl is empty"):
        read_client("ada", [tmp_path / "ada.jsonl"], tokenizer(), max_length=16)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "ada.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="client 'ada': 'ada.jsonl' cannot be read as UTF-8 text"):
        read_client("ada", [tmp_path / "ada.jsonl"], tokenizer(), max_length=16)


def test_reading_leaves_nothing_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    cache = datasets.config.HF_DATASETS_CACHE
    before = sorted(map(str, cache.rglob("*")))
    read(tmp_path, TEXT)
    with pytest.raises(ValueError):
        read(tmp_path, "{nope")
    assert list(scratch.iterdir()) == [] and sorted(map(str, cache.rglob("*"))) == before


def test_clients_are_folders_and_files(tmp_path):
    (tmp_path / "bob.smith").mkdir()
    for path in ("bob.smith/x.jsonl", "ada.jsonl", ".hidden", "bob.smith/notes.txt"):
        (tmp_path / path).write_text(TEXT)
    found = data_files(tmp_path)
    assert {name: [file.name for file in own] for name, own in found.items()} == {
        "ada": ["ada.jsonl"],
        "bob.smith": ["x.jsonl"],
    }


@pytest.mark.parametrize(
    "files, problem",
    [
        ([], "holds no client"),
        (["ada.csv"], "'ada.csv' .* neither a folder nor a .jsonl file"),
        (["ada/data.csv"], "client 'ada' has no .jsonl file"),
        (["ada/x.jsonl/y"], "client 'ada': 'x.jsonl' is not a regular file"),
        (["ada.jsonl", "Ada/x.jsonl"], "two clients have the name 'ada', case aside"),
        (["report.json.jsonl"], "'report.json' cannot be a client's name"),
        (["a\nb.jsonl"], r"'a\\nb' cannot be a client's name"),
    ],
)
def test_a_folder_that_is_not_plainly_clients_is_refused(tmp_path, files, problem):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(TEXT)
    with pytest.raises(ValueError, match=problem):
        data_files(tmp_path)


def test_held_back_examples_are_drawn_by_the_clients_name():
    examples = [{"input_ids": torch.tensor([i])} for i in range(20)]

    def held(name, share):
        own, back = hold_out(name, examples, share, seed=0)
        own, back = ([e["input_ids"].item() for e in part] for part in (own, back))
        assert sorted(own + back) == list(range(20)) and own == sorted(own)
        return back

    assert len(held("ada", 0.2)) == 4 and len(held("ada", 0.01)) == 1 and held("ada", 0.0) == []
    assert held("ada", 0.2) == held("ada", 0.2) != held("bob", 0.2)
    with pytest.raises(ValueError, match=r"client 'ada' has 1 example\(s\)"):
        hold_out("ada", examples[:1], 0.2, seed=0)
