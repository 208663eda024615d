"""Texts with classes through `datasets`: a hub name, local files, or what is in memory; and texts every Python has."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
OFFLINE = "give a local .csv, .jsonl or .parquet file, or texts and labels in memory"
PACKAGES = (
    "argparse", "asyncio", "ctypes", "_pydecimal", "email", "http", "importlib", "inspect", "ipaddress", "logging",
    "multiprocessing", "tarfile", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
"""Packages of the standard library with much source, which every CPython carries."""
EXCERPT = 3  # lines of source a text
LEAST = 60  # characters of a text
TESTS = {"test", "tests"}  # folders that not every installation has


@dataclass(frozen=True)
class Texts:
    """``texts`` and the class of each, an index into ``names``."""

    texts: Sequence[str]
    classes: Sequence[int]
    names: Sequence[str]

    def take(self, places: Sequence[int]) -> Texts:
        """Some of the texts."""
        return Texts([self.texts[i] for i in places], [self.classes[i] for i in places], self.names)


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
    data = _dataset(source, split)
    where = "the columns in memory" if isinstance(source, Mapping) else repr(str(source))
    for column in (text, label):
        if column not in data.column_names:
            raise ValueError(f"{where} has no column {column!r}; it has {', '.join(data.column_names)}")
    if not len(data):
        raise ValueError(f"{where} has no rows")
    named = getattr(data.features[label], "names", None)
    values = data[label][:]
    if missing := [row for row, value in enumerate(values) if value is None]:
        raise ValueError(f"{where}: row {missing[0]} has no {label!r}")
    names = named or [str(value) for value in sorted(set(values))]
    classes = values if named else [names.index(str(value)) for value in values]
    return Texts([str(value) for value in data[text]], classes, names)


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
    root = Path(sysconfig.get_paths()["stdlib"])
    columns: dict[str, list[str]] = {"text": [], "label": []}
    seen: set[str] = set()
    for name in packages:
        alone = root / f"{name}.py"
        files = [alone] if alone.is_file() else sorted((root / name).rglob("*.py"))
        for path in files:
            if TESTS & set(path.relative_to(root).parts):
                continue
            for text in _excerpts(path):
                if text not in seen:
                    seen.add(text)
                    columns["text"].append(text)
                    columns["label"].append(name.removeprefix("_py"))
    return load_texts(columns)


def _excerpts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    said = [line for line in lines if len(line) > 8 and not line.startswith(("import ", "from "))]
    parts = [" ".join(said[at : at + EXCERPT]) for at in range(0, len(said), EXCERPT)]
    return [part for part in parts if len(part) >= LEAST]
