"""The state of a training run as one safetensors file that is replaced whole; its header holds the rest as JSON."""

from __future__ import annotations

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

from clairlib.factors import LowRank
from clairlib.grouped import Stacks, Update

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write beside ``path`` and rename, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(own, partial, metadata={"facts": json.dumps(facts)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises
    ------
    ValueError
        The file is not a checkpoint, or that of a run with another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read ({error}); remove it") from error
    if facts.get("fingerprint") != fingerprint:
        raise ValueError(f"checkpoint {str(path)!r} is of other settings, data or model; remove it or name another")
    return tensors, facts


def pack_stacks(stacks: Stacks) -> dict[str, Tensor]:
    """Parameters, moments and best parameters by name."""
    tensors = {}
    for index, stack in enumerate(stacks.flat):
        tensors[f"stack.{index}"] = stack.detach()
        for moment in MOMENTS:
            if moment in stacks.optimizer.state[stack]:
                tensors[f"{moment}.{index}"] = stacks.optimizer.state[stack][moment]
    return tensors | {f"best.{index}": best for index, best in enumerate(stacks.best)}


def unpack_stacks(stacks: Stacks, tensors: Mapping[str, Tensor], clients: list[int], step: int) -> None:
    """Bring fresh stacks of all clients to the saved state, in which ``clients`` were still in training."""
    stacks.keep(clients)
    device = stacks.flat[0].device
    for index, stack in enumerate(stacks.flat):
        stack.data.copy_(tensors[f"stack.{index}"])
        state = {moment: tensors[f"{moment}.{index}"].to(device) for moment in MOMENTS}
        stacks.optimizer.state[stack] = {"step": torch.tensor(float(step), device=device), **state}
    stacks.best = [tensors[f"best.{i}"].to(device) for i in range(len(stacks.flat)) if f"best.{i}" in tensors]


def pack_updates(prefix: str, updates: Mapping[str, Update]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors by name, and the scale of every low-rank update."""
    tensors, scales = {}, {}
    for module, update in updates.items():
        if isinstance(update, LowRank):
            tensors[f"{prefix}/{module}/A"], tensors[f"{prefix}/{module}/B"] = update.A, update.B
            scales[module] = update.scale
        else:
            tensors[f"{prefix}/{module}/D"] = update
    return tensors, scales


def unpack_updates(prefix: str, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Update]:
    """The updates that `pack_updates` was given."""
    updates: dict[str, Update] = {}
    for key in tensors:
        start, _, rest = key.partition("/")
        module, _, factor = rest.rpartition("/")
        if start == prefix and factor == "D":
            updates[module] = tensors[key]
        elif start == prefix and factor == "A":
            updates[module] = LowRank(tensors[f"{prefix}/{module}/B"], tensors[key], scales[module])
    return updates


def digest(facts: Mapping[str, Any], parts: Iterable[Tensor]) -> str:
    """Hash of settings and tensors."""
    state = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in parts:
        state.update(f"{tuple(part.shape)} {part.dtype}".encode())
        state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
