"""Texts with classes through `datasets`: a hub name, local files, or what is in memory; and texts every Python has."""

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
"""Packages of the standard library with much source, which every CPython carries."""
EXCERPT = 3  # lines of source a text
LEAST = 60  # characters of a text
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TESTS = {"test", "tests"}  # folders that not every installation has


@dataclass(frozen=True)
class Texts:
    """``texts`` and the class of each, an index into ``names``."""

    texts: Sequence[str]
    classes: Sequence[int]
    names: Sequence[str]

    def take(self, places: Sequence[int]) -> Self:
        """Some of the texts."""
        return replace(self, texts=[self.texts[i] for i in places], classes=[self.classes[i] for i in places])


def load_texts(
    source: str | Path | Mapping[str, Sequence[Any]], *, text: str = "text", label: str = "label", split: str = "train"
) -> Texts:
    """Texts with classes from a data set of the Hugging Face hub, a local file, or columns in memory.

    Parameters
    ----------
    source : str, Path or mapping
        A mapping of columns; the path of a file (``READERS``); or any other string, a name on the hub.
    text, label : str
        Columns of the text and of its class: an index with names (``ClassLabel``), or the class itself.
    split : str
        Of a data set on the hub.

    Raises
    ------
    ValueError
        One line: what cannot be loaded or which column is missing, and what to give instead.
    """
    data = load_columns(source, (text, label), split)
    return Texts([str(value) for value in data[text]], *classes_of(data, label))


def load_columns(source: str | Path | Mapping[str, Sequence[Any]], columns: Sequence[str], split: str = "train") -> Any:
    """The `datasets.Dataset` behind a source of `load_texts`: it has rows, these columns, and no row without them.

    Raises
    ------
    ValueError
        One line: what cannot be loaded or is missing, and what to give instead.
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
    """The class of every row, an index into the names: a ``ClassLabel``'s own, or what the column holds, sorted."""
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
    """Excerpts of this Python's own standard library, ``EXCERPT`` lines each; the class is the package.

    The same on every machine with the same Python. Blank lines, imports and lines that say next to nothing are left
    out, and so is a text that comes twice.
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
    """Source of a module or package of this Python's standard library, tests left out, in the order of its paths."""
    alone = STDLIB / f"{package}.py"
    files = [alone] if alone.is_file() else sorted((STDLIB / package).rglob("*.py"))
    return [path for path in files if not TESTS & set(path.relative_to(STDLIB).parts)]


def _excerpts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    said = [line for line in lines if len(line) > 8 and not line.startswith(("import ", "from "))]
    parts = [" ".join(said[at : at + EXCERPT]) for at in range(0, len(said), EXCERPT)]
    return [part for part in parts if len(part) >= LEAST]
