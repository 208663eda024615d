"""Texts with classes, loaded through `datasets` from the hub, files or memory; and texts that every Python has."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
OFFLINE = "give a local .csv, .jsonl or .parquet file, or texts and labels in memory"
PACKAGES = (
    "argparse", "asyncio", "ctypes", "_pydecimal", "email", "http", "importlib", "inspect", "ipaddress", "logging",
    "multiprocessing", "tarfile", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
"""Packages of the standard library with much source code, which every CPython has."""
EXCERPT = 3  # source lines per text
LEAST = 60  # least number of characters of a text
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TESTS = {"test", "tests"}  # folders that some installations lack


@dataclass(frozen=True)
class Texts:
    """Texts and their classes; ``classes`` holds an index into ``names`` for each text."""

    texts: Sequence[str]
    classes: Sequence[int]
    names: Sequence[str]

    def take(self, places: Sequence[int]) -> Self:
        """Return the texts at the given places."""
        return replace(self, texts=[self.texts[i] for i in places], classes=[self.classes[i] for i in places])


def load_texts(
    source: str | Path | Mapping[str, Sequence[Any]], *, text: str = "text", label: str = "label", split: str = "train"
) -> Texts:
    """Load texts with classes from a data set of the Hugging Face hub, a local file, or columns in memory.

    Parameters
    ----------
    source : str, Path or mapping
        A mapping of columns; the path of a file (``READERS``); or any other string, a name on the hub.
    text, label : str
        Columns of the text and of its class: an index with names (``ClassLabel``), or the class itself.
    split : str
        Split of a data set on the hub.

    Raises
    ------
    ValueError
        Data cannot be loaded or a column is missing. The message is one line that says what to give instead.
    """
    data = load_columns(source, (text, label), split)
    return Texts([str(value) for value in data[text]], *classes_of(data, label))


def load_columns(source: str | Path | Mapping[str, Sequence[Any]], columns: Sequence[str], split: str = "train") -> Any:
    """Load the `datasets.Dataset` behind a source of `load_texts`, and check that it has rows and complete columns.

    Raises
    ------
    ValueError
        Data cannot be loaded, or a column, a value or every row is missing. The message is one line.
    """
    data = _dataset(source, split)
    where = "the columns in memory" if isinstance(source, Mapping) else repr(str(source))
    for column in columns:
        if column not in data.column_names:
            raise ValueError(f"{where} has no column {column!r}; it has {', '.join(data.column_names)}")
    if not len(data):
        raise ValueError(f"{where} has no rows")
    for column in columns:
        if missing := [row for row, value in enumerate(data[column][:]) if value is None]:
            raise ValueError(f"{where}: row {missing[0]} has no {column!r}")
    return data


def classes_of(data: Any, label: str) -> tuple[list[int], list[str]]:
    """Return the class of every row as an index into the names, and the names.

    Names are those of a ``ClassLabel`` column, or else the column's sorted values.
    """
    named, values = getattr(data.features[label], "names", None), data[label][:]
    names = named or [str(value) for value in sorted(set(values))]
    return values if named else [names.index(str(value)) for value in values], names


def _dataset(source: str | Path | Mapping[str, Sequence[Any]], split: str) -> Any:
    import datasets

    if isinstance(source, Mapping):
        return datasets.Dataset.from_dict({name: list(values) for name, values in source.items()})
    path = Path(source)
    try:
        if path.suffix in READERS or path.exists():
            if not path.is_file():
                raise ValueError(f"{str(path)!r} is not a file; {OFFLINE}")
            if path.suffix not in READERS:
                raise ValueError(f"{str(path)!r} is none of {', '.join(READERS)}")
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(str(source), split=split)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"data set {str(source)!r} cannot be loaded: {reason}; offline, {OFFLINE}") from error


def standard_library(packages: Sequence[str] = PACKAGES) -> Texts:
    """Make excerpts of this Python's standard library, ``EXCERPT`` lines each; the class is the package.

    They are the same on every machine with the same Python. Blank lines, imports and very short lines are left out, and
    repeated texts are used once.
    """
    columns: dict[str, list[str]] = {"text": [], "label": []}
    seen: set[str] = set()
    for name in packages:
        for path in source_files(name):
            for text in _excerpts(path):
                if text not in seen:
                    seen.add(text)
                    columns["text"].append(text)
                    columns["label"].append(name.removeprefix("_py"))
    return load_texts(columns)


def source_files(package: str) -> list[Path]:
    """Return the source files of a standard-library module or package, sorted by path, without its tests."""
    alone = STDLIB / f"{package}.py"
    files = [alone] if alone.is_file() else sorted((STDLIB / package).rglob("*.py"))
    return [path for path in files if not TESTS & set(path.relative_to(STDLIB).parts)]


def _excerpts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    said = [line for line in lines if len(line) > 8 and not line.startswith(("import ", "from "))]
    parts = [" ".join(said[at : at + EXCERPT]) for at in range(0, len(said), EXCERPT)]
    return [part for part in parts if len(part) >= LEAST]
