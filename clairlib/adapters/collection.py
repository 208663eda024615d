"""The clients' adapter folders as one set, with one base model and the same modules; tensors are read on demand."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from clairlib.adapters.config import CONFIG
from clairlib.adapters.folder import PICKLE, LoraFile, StoredFactors, open_lora
from clairlib.adapters.tensors import WEIGHTS, room_for
from clairlib.core.files import PAGE, PICTURE, REPORT, AdapterError
from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.linalg.low_rank import LowRank

RESERVED = {REPORT, PAGE, PICTURE}


@dataclass(frozen=True)
class AdapterFiles:
    """The adapters of K clients on one base model, checked as far as configurations and headers allow.

    No file is open and no tensor is in memory, for any K. The object can be sent to other processes. ``names`` are the
    folders' names; everything else is in the same order. ``modules`` maps a module's name (without PEFT's
    ``base_model.model.``) to the description of each client's factors.
    """

    names: list[str]
    folders: list[Path]
    files: list[LoraFile]
    modules: dict[str, list[StoredFactors]]

    @property
    def configs(self) -> list[dict[str, Any]]:
        """Contents of each client's adapter_config.json."""
        return [file.config for file in self.files]

    @property
    def module_bytes(self) -> dict[str, int]:
        """Number of bytes to read, by module."""
        return {module: sum(own.bytes for own in clients) for module, clients in self.modules.items()}

    @property
    def bytes(self) -> int:
        """Number of bytes to read in total."""
        return sum(self.module_bytes.values())

    def subset(self, chosen: Sequence[bool]) -> AdapterFiles:
        """Return the adapters of the clients that are ``chosen`` (K,)."""
        modules = {name: list(compress(own, chosen)) for name, own in self.modules.items()}
        names, folders = list(compress(self.names, chosen)), list(compress(self.folders, chosen))
        return AdapterFiles(names, folders, list(compress(self.files, chosen)), modules)

    def zero(self) -> list[bool]:
        """Return whether each client's update is zero in every module, as before training (B = 0)."""
        zero = [True] * len(self.names)
        for module in self.modules:
            own = [not bool((update.B != 0).any() and (update.A != 0).any()) for update in self.read(module)]
            zero = [before and now for before, now in zip(zero, own, strict=True)]
            if not any(zero):
                break
        return zero

    def load(self) -> dict[str, list[LowRank]]:
        """Return the updates of all modules, as `read` does."""
        return {module: self.read(module) for module in self.modules}

    def read(self, module: str) -> list[LowRank]:
        """Read the K clients' updates of one module, in the dtype of their files; errors as for `LoraFile.read`.

        The updates share one allocation, freed with the last of them: pages that are new to the process cost more than
        reading into them, and one large block is reused where many small ones are not.
        """
        sizes = [own.room for own in self.modules[module]]
        updates = []
        for name, file, room in zip(self.names, self.files, room_for(sum(sizes)).split(sizes), strict=True):
            with blaming(name):
                updates.append(file.read(module, room))
        return updates


def open_adapters(paths: Sequence[str | Path]) -> AdapterFiles:
    """Check that the clients' adapters can be compared, without reading their tensors.

    ``paths`` are adapter folders (adapter_config.json, adapter_model.safetensors), or one parent folder of them.

    Raises
    ------
    AdapterError
        One line that names the client and says what is wrong with its folder, or how it differs from the others.
    """
    clients = client_folders(paths)
    files: dict[str, LoraFile] = {}
    for name, folder in clients.items():
        with blaming(name):
            files[name] = open_lora(folder)
    _check_agreement(files)
    own = list(files.values())
    modules = {module: [file.modules[module] for file in own] for module in own[0].modules}
    return AdapterFiles(list(clients), list(clients.values()), own, modules)


def client_folders(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Return client name -> adapter folder, from adapter folders or from one parent folder of them.

    In a parent folder every subfolder that is not hidden is a client; none is skipped because it lacks a file.

    Raises
    ------
    AdapterError
        There are fewer than three clients, two clients have the same name (ignoring case), a name cannot be that of an
        output folder, or a folder does not exist.
    """
    folders = [Path(os.path.abspath(path)) for path in paths]
    for folder in folders:
        if not folder.is_dir():
            raise AdapterError(f"{str(folder)!r} is not a folder")
    if len(folders) == 1 and not any((folders[0] / name).exists() for name in (CONFIG, WEIGHTS, PICKLE)):
        folders = sorted(path for path in folders[0].iterdir() if path.is_dir() and path.name[0] != ".")
    clients: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for folder in folders:
        name = folder.name
        if not name or not name.isprintable() or name.casefold() in RESERVED:
            raise AdapterError(f"{name!r} cannot be a client's name; rename the folder")
        # on some file systems they are the same folder
        if (twin := taken.setdefault(name.casefold(), folder)) is not folder:
            raise AdapterError(f"two clients have the name {name!r}, case aside: {str(twin)!r} and {str(folder)!r}")
        clients[name] = folder
    if len(clients) < MINIMUM_CLIENTS:
        found = f"{len(clients)} ({', '.join(clients)})" if clients else "none"
        raise AdapterError(f"at least {MINIMUM_CLIENTS} clients are needed, got {found}")
    return clients


@contextmanager
def blaming(client: str) -> Iterator[None]:
    """Put the client's name before the message of any AdapterError that the block raises."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"client {client!r}: {error}") from error


def _check_agreement(files: dict[str, LoraFile]) -> None:
    if (odd := _odd_one_out({name: _base(file.config) for name, file in files.items()})) is not None:
        name, base, usual = odd
        raise AdapterError(f"client {name!r} has base model {base}, other clients have {usual}")
    if (odd := _odd_one_out({name: frozenset(file.modules) for name, file in files.items()})) is not None:
        name, own, usual = odd
        missing, extra = sorted(usual - own), sorted(own - usual)
        what = f"lacks module {missing[0]!r}" if missing else f"has module {extra[0]!r}"
        more = len(missing) + len(extra) - 1
        rest = f" ({more} more {'difference' if more == 1 else 'differences'})" if more else ""
        raise AdapterError(f"client {name!r} {what}, unlike the other clients{rest}")
    for module in next(iter(files.values())).modules:
        if (odd := _odd_one_out({name: file.modules[module].shape for name, file in files.items()})) is not None:
            name, shape, usual = odd
            raise AdapterError(f"client {name!r}: module {module!r} has shape {shape}, expected {usual}")


def _odd_one_out(values: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first client whose value is not the most frequent one, as (client, its value, the usual value)."""
    counts: Counter[Hashable] = Counter(values.values())
    usual = counts.most_common(1)[0][0]
    return next(((name, value, usual) for name, value in values.items() if value != usual), None)


def _base(config: dict[str, Any]) -> str:
    name, revision = config.get("base_model_name_or_path"), config.get("revision") or "main"
    return repr(name) if revision == "main" else f"{name!r} revision {revision!r}"
