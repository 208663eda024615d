"""Reading and writing of one client's PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.

The folder comes from a client that may be hostile. Nothing is unpickled, and every declared size is checked against the
file before a tensor is read. Every tensor that is not a factor of a linear module is refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clairlib.adapters.config import read_config, scales_of
from clairlib.adapters.tensors import WEIGHTS, Factors, Place, largest, read_header, read_tensor, room_for
from clairlib.adapters.writer import AdapterWriter
from clairlib.core.files import AdapterError, regular_file
from clairlib.linalg.low_rank import LowRank

PICKLE = "adapter_model.bin"
LARGEST = 1e30  # larger norms leave no room for squares in float64 or for a product in float32

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class StoredFactors(Factors):
    """Factors of one module in a file, with their places in the file."""

    B: Place
    A: Place

    @property
    def room(self) -> int:
        """Bytes of memory that both factors take when they are read."""
        return self.B.room + self.A.room


@dataclass(frozen=True)
class LoraFile:
    """One client's adapter, described by its checked configuration and the header of its file, which is not kept open.

    ``modules`` maps names without PEFT's ``base_model.model.`` to factors. ``stamp`` is device, inode, size and
    modification time of the file when it was checked.
    """

    path: Path
    config: dict[str, Any]
    modules: dict[str, StoredFactors]
    stamp: Stamp

    def read(self, module: str, room: Tensor | None = None) -> LowRank:
        """Read the module's update, in the dtype of the file, into ``room`` if given: at least as many bytes as needed.

        Raises
        ------
        AdapterError
            The file changed since it was opened, or a factor has NaN, infinite or too large entries.
        """
        own = self.modules[module]
        room = room_for(own.room) if room is None else room
        with unchanged(self.path, self.stamp) as file:
            B = read_tensor(file, own.B, room)
            update = LowRank(B, read_tensor(file, own.A, room[own.B.room :]), own.scale)
        _check_values(module, own, update)
        return update


def open_lora(folder: Path) -> LoraFile:
    """Open the adapter of one folder, without reading its tensors.

    With ``fan_in_fan_out`` (Conv1D) PEFT stores the factors in the same orientation, B (out, rho) and A (rho, in), and
    transposes their product when it merges them. The update here is always (out, in).

    Raises
    ------
    AdapterError
        One line that names the file, option, module or tensor that cannot be used.
    """
    config = read_config(folder)
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise AdapterError(f"{PICKLE} is a pickle and is never opened; save the adapter as {WEIGHTS}")
    path = Path(os.path.realpath(regular_file(folder, WEIGHTS)))
    stamp = _stamp(path.stat())
    pairs = {module: _pair(module, factors) for module, factors in read_header(path).items()}
    with unchanged(path, stamp):
        scales = scales_of(config, {module: A.shape[0] for module, (_, A) in pairs.items()})
    modules = {}
    for module, (B, A) in pairs.items():
        modules[module] = StoredFactors(B.shape[0], A.shape[1], A.shape[0], B.dtype, A.dtype, scales[module], B, A)
    return LoraFile(path, config, modules, stamp)


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, LowRank]]:
    """Return configuration and updates of a folder; errors as for :func:`open_lora` and :meth:`LoraFile.read`."""
    file = open_lora(folder)
    return file.config, {module: file.read(module) for module in file.modules}


def write_lora(folder: Path, config: dict[str, Any], updates: dict[str, LowRank]) -> None:
    """Write updates as a new adapter folder; errors as for `AdapterWriter.write`."""
    writer = AdapterWriter(folder, config, {module: Factors.of(update) for module, update in updates.items()})
    writer.create()
    for module, update in updates.items():
        writer.write(module, update)
    writer.finish()


@contextmanager
def unchanged(path: Path, stamp: Stamp) -> Iterator[FileIO]:
    """Open a file; raise AdapterError if it cannot be read, or has another stamp when the block ends."""
    try:
        # without O_NONBLOCK, reading a pipe at the file's path would wait for ever
        with FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            yield file
            if _stamp(os.fstat(file.fileno())) != stamp:
                raise AdapterError(f"{WEIGHTS} changed while it was being read; run again when nothing writes to it")
    except OSError as error:
        raise AdapterError(f"{WEIGHTS} cannot be read: {error.strerror or error}") from error


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _pair(module: str, factors: dict[str, Place]) -> tuple[Place, Place]:
    """Return B and A of one module."""
    if len(factors) < 2:
        raise AdapterError(f"module {module!r} has lora_{next(iter(factors))} but not the other factor")
    B, A = factors["B"], factors["A"]
    if B.shape[1] != A.shape[0]:
        raise AdapterError(f"module {module!r}: lora_B {B.shape} and lora_A {A.shape} cannot be multiplied")
    if A.shape[0] > max(B.shape[0], A.shape[1]):
        raise AdapterError(f"module {module!r}: lora_B {B.shape} and lora_A {A.shape} have more rank than the update")
    return B, A


def _check_values(module: str, own: StoredFactors, update: LowRank) -> None:
    most = {}
    for place, values in ((own.B, update.B), (own.A, update.A)):
        most[place] = largest(values)
        if not math.isfinite(most[place]):
            raise AdapterError(f"tensor {place.key!r} has NaN or infinite entries")
    b, a = (most[place] * math.sqrt(math.prod(place.shape)) for place in (own.B, own.A))  # upper bounds of the norms
    if not _fits(b, a, update.scale):
        b, a = _norm(update.B), _norm(update.A)
        if not _fits(b, a, update.scale):
            raise AdapterError(f"module {module!r}: the update is too large, its factors have norms {b:.3g}, {a:.3g}")


def _fits(b: float, a: float, scale: float) -> bool:
    return max(b, a, abs(scale) * b * a) <= LARGEST


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
