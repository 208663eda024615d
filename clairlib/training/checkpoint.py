"""The state of a training run as one safetensors file, which is replaced as a whole.

Its header holds the state that is not tensors as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clairlib.linalg.low_rank import LowRank
from clairlib.training.grouped_lora import LoraStacks, Update

MOMENTS = ("exp_avg", "exp_avg_sq")


def pack_stacks(stacks: LoraStacks) -> dict[str, Tensor]:
    """Return the parameters, AdamW's moments and the best parameters by name."""
    tensors = {}
    for index, stack in enumerate(stacks.flat):
        tensors[f"stack.{index}"] = stack.detach()
        for moment in MOMENTS:
            if moment in stacks.optimizer.state[stack]:
                tensors[f"{moment}.{index}"] = stacks.optimizer.state[stack][moment]
    return tensors | {f"best.{index}": best for index, best in enumerate(stacks.best)}


def unpack_stacks(stacks: LoraStacks, tensors: Mapping[str, Tensor], clients: list[int], step: int) -> None:
    """Bring new stacks of all clients to the saved state, in which only ``clients`` were still in training."""
    stacks.keep(clients)
    device = stacks.flat[0].device
    for index, stack in enumerate(stacks.flat):
        stack.data.copy_(tensors[f"stack.{index}"])
        state = {moment: tensors[f"{moment}.{index}"].to(device) for moment in MOMENTS}
        stacks.optimizer.state[stack] = {"step": torch.tensor(float(step), device=device), **state}
    stacks.best = [tensors[f"best.{i}"].to(device) for i in range(len(stacks.flat)) if f"best.{i}" in tensors]


def pack_updates(prefix: str, updates: Mapping[str, Update]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a client's tensors by name, and the scale of every low-rank update by module."""
    tensors, scales = {}, {}
    for module, update in updates.items():
        if isinstance(update, LowRank):
            tensors[f"{prefix}/{module}/A"], tensors[f"{prefix}/{module}/B"] = update.A, update.B
            scales[module] = update.scale
        else:
            tensors[f"{prefix}/{module}/D"] = update
    return tensors, scales


def unpack_updates(prefix: str, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Update]:
    """Return the updates that `pack_updates` packed."""
    updates: dict[str, Update] = {}
    for key in tensors:
        start, _, rest = key.partition("/")
        module, _, factor = rest.rpartition("/")
        if start == prefix and factor == "D":
            updates[module] = tensors[key]
        elif start == prefix and factor == "A":
            updates[module] = LowRank(tensors[f"{prefix}/{module}/B"], tensors[key], scales[module])
    return updates


