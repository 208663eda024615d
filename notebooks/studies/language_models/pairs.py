"""Instructions with responses of several tokens, from a data set or from the documentation that every Python has."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from clairlib.training.client_data import example_of
from studies.language_models.texts import STDLIB, Texts, classes_of, load_columns, source_files

AFTER = "\nResponse:"  # text between an instruction and its response
TOPICS = ("asyncio", "_pydecimal", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""The categories: packages of the standard library with the most documented functions, which every CPython has."""
PUBLIC = (
    "_pyio", "argparse", "bdb", "calendar", "cmd", "codecs", "collections", "concurrent", "configparser", "contextlib",
    "ctypes", "datetime", "difflib", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "html",
    "http", "imaplib", "inspect", "ipaddress", "json", "locale", "mailbox", "numbers", "operator", "optparse", "os",
    "pathlib", "pdb", "pickle", "pickletools", "platform", "poplib", "pprint", "pydoc", "random", "sched", "selectors",
    "shelve", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string", "subprocess", "sysconfig",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types", "typing", "urllib",
    "uuid", "warnings", "wave", "weakref", "wsgiref", "xmlrpc", "zipfile", "zoneinfo",
)  # fmt: skip
"""Other packages, on whose documentation the base model ``TINY`` is trained."""
LEAST_WORDS = 3  # least number of words of a response


@dataclass(frozen=True)
class Pairs(Texts):
    """Instructions (``texts``) with ``responses``; ``classes`` and ``names`` are the instructions' categories."""

    responses: Sequence[str]

    def take(self, places: Sequence[int]) -> Self:
        """Return the pairs at the given places."""
        return replace(super().take(places), responses=[self.responses[i] for i in places])


def load_pairs(
    source: str | Path | Mapping[str, Sequence[Any]],
    *,
    instruction: str = "instruction",
    response: str = "response",
    category: str = "category",
    context: str = "context",
    split: str = "train",
) -> Pairs:
    """Load pairs from a source of `texts.load_texts`; the default column names are those of Dolly.

    If there is a column ``context``, its text is appended to the instruction. Pairs with a blank instruction or
    response are left out.

    Raises
    ------
    ValueError
        Data cannot be loaded or are incomplete. The message is one line.
    """
    data = load_columns(source, (instruction, response, category), split)
    asked, answered = ([str(value).strip() for value in data[name][:]] for name in (instruction, response))
    if context in data.column_names:
        more = [str(value or "").strip() for value in data[context][:]]
        asked = ["\n".join(filter(None, parts)) for parts in zip(asked, more, strict=True)]
    pairs = Pairs(asked, *classes_of(data, category), answered)
    return pairs.take([i for i in range(len(asked)) if asked[i] and answered[i]])


def docstrings(packages: Sequence[str] = TOPICS) -> Pairs:
    """Pair functions and classes of this Python's standard library with the first sentence of their docstrings.

    The instruction is the full name with the arguments; the category is the package. Pairs are the same on every
    machine with the same Python. If several pairs of one package have the same response, only the first is used.
    """
    columns: dict[str, list[str]] = {"instruction": [], "response": [], "category": []}
    for package in packages:
        seen: set[str] = set()
        name = package.removeprefix("_py")
        for path in source_files(package):
            module = ".".join([name, *path.relative_to(STDLIB).with_suffix("").parts[1:]]).removesuffix(".__init__")
            for instruction, response in _documented(ast.parse(path.read_text(encoding="utf-8")), module):
                if response not in seen and len(response.split()) >= LEAST_WORDS:
                    seen.add(response)
                    for key, value in zip(columns, (instruction, response, name), strict=True):
                        columns[key].append(value)
    return load_pairs(columns)


def _documented(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield signature and first sentence of every documented definition below a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own = f"{name}.{node.name}"
            if text := ast.get_docstring(node):
                arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
                yield own + arguments, _first_sentence(text)
            yield from _documented(node, own)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0]


def example(instruction: str, response: str, tokenizer: Any, length: int) -> tuple[Mapping[str, Tensor], int]:
    """Convert a pair for the trainer, cut at ``length`` tokens, and count the tokens of the whole pair.

    The loss is taken over the response.
    """
    return example_of({"prompt": instruction + AFTER, "completion": f" {response}"}, tokenizer, length)


def examples_of(pairs: Pairs, tokenizer: Any, length: int) -> list[Mapping[str, Tensor]]:
    """Convert all pairs for the trainer; a response is cut where the pair exceeds ``length`` tokens."""
    both = zip(pairs.texts, pairs.responses, strict=True)
    return [example(instruction, response, tokenizer, length)[0] for instruction, response in both]


def fitting(pairs: Pairs, tokenizer: Any, length: int) -> tuple[Pairs, list[Mapping[str, Tensor]]]:
    """Return the pairs with at most ``length`` tokens, and the same pairs converted for the trainer."""
    both = zip(pairs.texts, pairs.responses, strict=True)
    made = [example(instruction, response, tokenizer, sys.maxsize) for instruction, response in both]
    places = [i for i, (_, own) in enumerate(made) if own <= length]
    return pairs.take(places), [made[i][0] for i in places]
