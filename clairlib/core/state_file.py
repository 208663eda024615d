"""State files: tensors and JSON facts in one safetensors file, which is replaced as a whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clairlib.core.files import write_atomically


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write to a file beside ``path`` and rename it, so that a killed process leaves either the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with write_atomically(path) as partial:
        save_file(own, partial, metadata={"facts": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())


def load(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts that `save` wrote; raise ValueError if the file is no such file or another run's."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read ({error}); remove it") from error
    if facts.get("fingerprint") != fingerprint:
        raise ValueError(f"checkpoint {str(path)!r} is of other settings, data or model; remove it or name another")
    return tensors, facts


def digest(facts: Mapping[str, Any], parts: Iterable[Tensor]) -> str:
    """Return the sha256 of settings and tensors, in hexadecimal."""
    state = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in parts:
        state.update(f"{tuple(part.shape)} {part.dtype}".encode())
        state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
