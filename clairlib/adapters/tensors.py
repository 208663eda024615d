"""The tensors of adapter_model.safetensors: what the header declares, where each tensor lies, and reading and writing.

The file may come from a hostile client. safetensors checks its header first, and refuses sizes that do not cover the
file exactly. Values are read, not mapped, because a mapped file that shrinks ends the process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from sys import intern
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clairlib.core.files import AdapterError
from clairlib.linalg.low_rank import LowRank

WEIGHTS = "adapter_model.safetensors"
# In the order of the format, so that each tensor begins at a multiple of the size of its entries.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ALIGNMENT = 64  # alignment of a tensor in memory, in bytes
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors without their values: B is (p, rank), A is (rank, q), and ``scale`` is that of B @ A."""

    p: int
    q: int
    rank: int
    B_dtype: torch.dtype
    A_dtype: torch.dtype
    scale: float

    @classmethod
    def of(cls, update: LowRank) -> Factors:
        """Describe the factors of an update."""
        return cls(*update.shape, update.rank, update.B.dtype, update.A.dtype, update.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the update."""
        return self.p, self.q

    @property
    def bytes(self) -> int:
        """Size of both factors in the file, in bytes."""
        return self.rank * (self.p * self.B_dtype.itemsize + self.q * self.A_dtype.itemsize)


class Place(NamedTuple):
    """Place of a tensor in a file: name, shape, dtype, and the offset of its first byte in the file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Size of the tensor in bytes, rounded up so that another tensor may follow in memory."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


def read_header(path: Path) -> dict[str, dict[str, Place]]:
    """Return the factors that a file declares: module -> "A", "B" -> place, in the order of the sorted names.

    Raises
    ------
    AdapterError
        The file is not a safetensors file, or contains a tensor that is not a factor of a linear module.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # with "pt" the whole file would be loaded as one storage
            slices = {key: file.get_slice(key) for key in file.offset_keys()}
        with FileIO(path) as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")
    except (SafetensorError, OSError) as error:
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:200])  # the error may quote the header
        raise AdapterError(f"{WEIGHTS} is truncated or not a safetensors file ({reason})") from error
    places: dict[str, tuple[str, str, Place]] = {}
    for key, header in slices.items():  # the format allows no gaps
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        module, factor = _check_declared(key, shape, dtype)
        places[key] = module, factor, Place(intern(key), shape, DTYPES[dtype], offset)
        offset += places[key][-1].bytes
    modules: dict[str, dict[str, Place]] = {}
    for _, (module, factor, place) in sorted(places.items()):
        if factor in modules.setdefault(intern(module), {}):
            raise AdapterError(f"module {module!r} has lora_{factor} twice")
        modules[module][factor] = place
    if not modules:
        raise AdapterError(f"{WEIGHTS} holds no LoRA factors")
    return modules


def lay_out(modules: Mapping[str, Factors]) -> tuple[bytes, dict[str, tuple[Place, Place]], int]:
    """Return the length and header of a file that holds these factors, byte for byte as safetensors writes them.

    Also return each module's places of B and A, and the size of the file in bytes.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {}
    for module, own in modules.items():
        tensors[_key(module, "B")] = ((own.p, own.rank), own.B_dtype)
        tensors[_key(module, "A")] = ((own.rank, own.q), own.A_dtype)
    order = list(names)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: (order.index(item[1][1]), item[0])):
        begins[key], end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begins[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {key: Place(key, *own, start + begins[key]) for key, own in tensors.items()}
    pairs = {module: (places[_key(module, "B")], places[_key(module, "A")]) for module in modules}
    return len(text).to_bytes(8, "little") + text, pairs, start + end


def room_for(size: int) -> Tensor:
    """Allocate ``size`` bytes, not initialised; raise AdapterError if there is not enough memory."""
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise AdapterError(f"{size} bytes of {WEIGHTS} do not fit into memory") from error


def read_tensor(file: FileIO, place: Place, room: Tensor) -> Tensor:
    """Read the tensor at this place into the beginning of ``room``; raise AdapterError if the file ends before it."""
    values = room[: place.bytes].view(place.dtype).view(place.shape)
    left = bytes_of(values)
    file.seek(place.offset)
    while left:  # one call reads at most 2 GiB
        if not (count := file.readinto(left)):
            raise AdapterError(f"{WEIGHTS} ends before tensor {place.key!r} does; it changed while it was being read")
        left = left[count:]
    return values


def write_at(file: FileIO, offset: int, left: memoryview) -> None:
    """Write the bytes ``left`` into the file, from this offset on."""
    file.seek(offset)
    while left:
        left = left[file.write(left) :]


def largest(values: Tensor) -> float:
    """Return the largest absolute value; NaN or infinite if any entry is."""
    low, high = values.aminmax()  # both are NaN if any entry is
    return max(-float(low), float(high))


def bytes_of(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return values.view(-1).view(torch.uint8).numpy().data


def _key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _check_declared(key: str, shape: tuple[int, ...], dtype: str) -> tuple[str, str]:
    """Return the module and the factor that a tensor's name stands for; refuse what is no factor of a linear module."""
    match = KEY.fullmatch(key)
    if "lora_embedding_" in key:
        raise AdapterError(f"tensor {key!r}: LoRA of an embedding is not supported")
    if match is None or not key.isprintable():
        raise AdapterError(f"tensor {key!r} in {WEIGHTS} is not a LoRA factor of a linear module")
    if len(shape) != 2:
        kind = "LoRA of a convolution" if len(shape) in (3, 4, 5) else "this"
        raise AdapterError(f"tensor {key!r} has shape {shape}: {kind} is not supported, only matrices")
    if 0 in shape:
        raise AdapterError(f"tensor {key!r} is empty, shape {shape}")
    if dtype not in DTYPES:
        raise AdapterError(f"tensor {key!r} has dtype {dtype}, supported are {', '.join(DTYPES)}")
    return match["module"], match["factor"]
