"""The clients' own data: folders of JSON-lines files, read through `datasets` and tokenised."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clairlib.adapters.collection import RESERVED
from clairlib.core.seeds import derive
from clairlib.training.schedule import NO_LABEL

LONGEST = 1_000_000  # most characters of a line; a file with longer lines is not JSON-lines
FORMS = (("text",), ("prompt", "completion"), ("messages",))

Example = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """One client's tokenised examples, and the number of those cut off at the maximal length."""

    examples: list[Example]
    truncated: int


def data_files(folder: Path) -> dict[str, list[Path]]:
    """Return client name -> its files: NAME.jsonl, or all .jsonl files of the folder NAME in the order of their names.

    Hidden files are ignored.

    Raises
    ------
    ValueError
        A name cannot name an output folder, a folder holds no data, a file is of another type, or there is no client.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder")
    clients: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
        name = path.name if path.is_dir() else path.stem
        if not path.is_dir() and path.suffix != ".jsonl":
            raise ValueError(f"{path.name!r} in {str(folder)!r} is neither a folder nor a .jsonl file; move it away")
        if not name.isprintable() or name.casefold() in RESERVED:
            raise ValueError(f"{name!r} cannot be a client's name; rename {str(path)!r}")
        if name.casefold() in map(str.casefold, clients):  # on some file systems the same folder
            raise ValueError(f"two clients have the name {name!r}, case aside")
        clients[name] = sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]
        if not clients[name]:
            raise ValueError(f"client {name!r} has no .jsonl file in {str(path)!r}")
        if odd := [file.name for file in clients[name] if not file.is_file()]:
            raise ValueError(f"client {name!r}: {odd[0]!r} is not a regular file")
    if not clients:
        raise ValueError(f"{str(folder)!r} holds no client: neither a folder nor a .jsonl file")
    return clients


def read_client(
    name: str, files: Sequence[Path], tokenizer: Any, *, max_length: int, classes: Mapping[str, int] | None = None
) -> Tokens:
    """Read one client's examples, one per non-blank line, and cut them off at ``max_length`` tokens.

    A line is one of these:

    * ``{"text": ...}``: the whole text is learnt;
    * ``{"prompt": ..., "completion": ...}``: only the completion is learnt;
    * ``{"messages": [{"role": ..., "content": ...}, ...]}``: only the last message is learnt, which must be the
      assistant's, in the tokenizer's chat template;
    * ``{"text": ..., "label": class or index}`` with ``classes`` (class name -> index).

    The first two forms are learnt up to the token that ends a text. Other fields are ignored.

    Raises
    ------
    ValueError
        A line or file cannot be used. The message is one line that names client, file and line.
    """
    examples: list[Example] = []
    truncated = 0
    for file, number, line in _lines(name, files):
        try:
            example, length = example_of(_parsed(line), tokenizer, max_length, classes)
        except ValueError as error:
            raise ValueError(f"client {name!r}: line {number} of {file.name!r} {error}") from error
        truncated += length > max_length
        examples.append(example)
    if not examples:
        raise ValueError(f"client {name!r} has no examples: {', '.join(file.name for file in files)} is empty")
    return Tokens(examples, truncated)


def example_of(
    fields: Mapping[str, Any], tokenizer: Any, max_length: int, classes: Mapping[str, int] | None = None
) -> tuple[Example, int]:
    """Return the example of a line's fields, as in `read_client`, cut off, and its number of tokens before the cut."""
    if classes is not None:
        text, label = _string(fields, "text"), _class(fields, classes)
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if not ids:
            raise ValueError("has no tokens")
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(label)}, len(tokenizer(text)["input_ids"])
    ids, labels = _text(fields, tokenizer)
    if set(labels[1:max_length]) <= {NO_LABEL}:  # the first token is never predicted
        raise ValueError(f"leaves nothing to learn within {max_length} tokens; it has {len(ids)}")
    return {"input_ids": torch.tensor(ids[:max_length]), "labels": torch.tensor(labels[:max_length])}, len(ids)


def _lines(name: str, files: Sequence[Path]) -> Iterator[tuple[Path, int, str]]:
    """Yield (file, line number, line) of every non-blank line.

    The JSON reader of datasets is not used: it converts text that looks like a date, and does not number lines.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    with tempfile.TemporaryDirectory(prefix="clair-data-") as cache:
        for index, file in enumerate(files):
            if not file.stat().st_size:  # datasets cannot infer columns from an empty file
                continue
            link = Path(cache) / f"{index}.jsonl"  # datasets would take brackets and colons in a path for patterns
            link.symlink_to(file.resolve())
            try:
                rows = Dataset.from_text(str(link), cache_dir=cache, encoding="utf-8-sig")["text"]
            except (DatasetGenerationError, OSError) as error:
                reason = error.__cause__ or error
                raise ValueError(f"client {name!r}: {file.name!r} cannot be read as UTF-8 text ({reason})") from error
            yield from ((file, number, line) for number, line in enumerate(rows, start=1) if line.strip())


def _parsed(line: str) -> dict[str, Any]:
    if len(line) > LONGEST:
        raise ValueError(f"has {len(line)} characters; more than {LONGEST} are not read")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {type(fields).__name__}")
    return fields


def _string(fields: Mapping[str, Any], key: str) -> str:
    if key not in fields:
        raise ValueError(f"lacks {key!r}")
    value = fields[key]
    if not isinstance(value, str):
        raise ValueError(f"has {key!r} that is no string but {type(value).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"has {key!r} with half of a surrogate pair, which is no character")
    return value


def _class(fields: Mapping[str, Any], classes: Mapping[str, int]) -> int:
    if "label" not in fields:
        raise ValueError("lacks 'label'")
    label = fields["label"]
    if isinstance(label, str) and label in classes:
        return classes[label]
    if type(label) is int and label in classes.values():
        return label
    raise ValueError(f"has label {label!r:.99}; the model knows {', '.join(map(repr, classes))}, or their indices")


def _text(fields: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a text; the prompt has NO_LABEL."""
    forms = [form for form in FORMS if form[0] in fields]
    if len(forms) != 1:
        raise ValueError("must have one of 'text', 'prompt' with 'completion', or 'messages'")
    if forms[0][0] == "messages":
        prompt, whole = _chat(fields["messages"], tokenizer)
        ids, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
        return _labelled(ids, before)
    parts = [_string(fields, key) for key in forms[0]]
    ids, end = tokenizer("".join(parts))["input_ids"], tokenizer.eos_token_id
    ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
    return _labelled(ids, tokenizer(parts[0])["input_ids"] if len(parts) == 2 else [])


def _labelled(ids: list[int], prompt: list[int]) -> tuple[list[int], list[int]]:
    """Label the tokens from the first one that differs from the prompt's, so one that spans both parts is learnt."""
    pairs = enumerate(zip(ids, prompt, strict=False))
    first = next((place for place, (own, other) in pairs if own != other), min(len(ids), len(prompt)))
    return ids, [NO_LABEL] * first + ids[first:]


def _chat(messages: Any, tokenizer: Any) -> tuple[str, str]:
    """Return the conversation without its last message, and the whole one, as text by the tokenizer's template."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError("has 'messages', but the tokenizer has no chat template; give 'prompt' and 'completion'")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("has 'messages' that is no list of objects")
    turns = [{key: _string(message, key) for key in ("role", "content")} for message in messages]
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("has 'messages' that do not end with one of the role 'assistant'")
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        return prompt, tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"has 'messages' that the chat template refuses ({error})") from error


def hold_out(name: str, examples: Sequence[Example], share: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those to validate with, drawn by ``(name, "validation")``.

    The second part is a fraction ``share`` of the examples, and at least one unless ``share`` is 0.

    Raises
    ------
    ValueError
        No example is left to train on.
    """
    count = len(examples)
    held = max(1, round(share * count)) if share else 0
    if held >= count:
        rest = f"holding back {share:g} of them leaves none to train on"
        raise ValueError(f"client {name!r} has {count} example(s); {rest}")
    chosen = set(torch.randperm(count, generator=derive(seed, name, "validation")).tolist()[:held])
    own = [example for place, example in enumerate(examples) if place not in chosen]
    return own, [examples[place] for place in sorted(chosen)]
