"""The adapted modules of a model, the kind of its labels, and the updates that training starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from clairlib.adapters.folder import read_lora
from clairlib.core.files import AdapterError
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import LowRank
from clairlib.training.grouped_lora import Update
from clairlib.training.schedule import ClientData

LOSSES = {  # transformers' loss_type: (labels belong to the position before, one label per example)
    "ForCausalLM": (True, False),
    "ForMaskedLM": (False, False),
    "ForTokenClassification": (False, False),
    "ForSequenceClassification": (False, True),
}


def loss_kind(model: Any) -> tuple[bool, bool]:
    """Return whether labels belong to the position before theirs, and whether there is one per example.

    Raises
    ------
    ValueError
        The model's loss is not in LOSSES, or is a regression.
    """
    kind = getattr(model, "loss_type", None)
    if kind is None and model.get_output_embeddings() is not None:
        kind = "ForCausalLM"  # the fallback of transformers, for example for GPT2LMHeadModel
    what, config = type(model).__name__, model.config
    if kind not in LOSSES:
        raise ValueError(f"{what} has no loss that can be trained here; known are {', '.join(LOSSES)}")
    if LOSSES[kind][1] and (config.num_labels == 1 or config.problem_type not in (None, "single_label_classification")):
        raise ValueError(f"{what} does not choose one of several classes; only that can be trained")
    return LOSSES[kind]


def num_labels(model: Any, *, classes: bool) -> int:
    """Return the number of different labels: tokens, or classes."""
    head = model.get_output_embeddings()
    return model.config.num_labels if classes or head is None else head.out_features


def target_names(model: Any, targets: Sequence[str] | str) -> list[str]:
    """Return the full names of the modules that peft's ``target_modules`` selects, in the model's order.

    A list holds full names or their ends. A string is a regular expression, or "all-linear": every one but the head.

    Raises
    ------
    ValueError
        No module has such a name, or one is not an ``nn.Linear``.
    """
    if targets == "all-linear":
        body = getattr(model, model.base_model_prefix, model)
        inside = {id(module) for module in body.modules() if isinstance(module, nn.Linear)}
        inside.discard(id(model.get_output_embeddings()))
        return [name for name, module in model.named_modules() if id(module) in inside]
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    names = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    if not names:
        raise ValueError(f"no module of {type(model).__name__} has a name like {targets!r}")
    for name, module in ((name, model.get_submodule(name)) for name in names):
        if not isinstance(module, nn.Linear):
            raise ValueError(f"target {name!r} is a {type(module).__name__}; only nn.Linear modules can be adapted")
    return names


def initial_updates(
    model: Any, targets: Sequence[str], clients: Sequence[ClientData], *, seed: int
) -> dict[str, list[Update]]:
    """Return the updates by module from which every client starts: its adapter folder, if it has one.

    Otherwise a full-matrix update is zero, B is zero, and A is drawn from (client's name, module's name) with peft's
    distribution, U(-1, 1) / sqrt(q). Adapters of half-precision models are float32, as in peft.
    """
    updates: dict[str, list[Update]] = {name: [] for name in targets}
    for client in clients:
        own = _read_start(client, targets) if client.start is not None else None
        for name in targets:
            weight = model.get_submodule(name).weight
            dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
            if own is None:
                updates[name].append(_fresh(client, name, weight.shape, dtype, seed))
                continue
            B, A, scale = own[name].B, own[name].A, own[name].scale
            if own[name].shape != tuple(weight.shape):
                shapes = f"has shape {own[name].shape}, expected {tuple(weight.shape)}"
                raise AdapterError(f"client {client.name!r}: module {name!r} in {str(client.start)!r} {shapes}")
            updates[name].append(LowRank(B.to(dtype), A.to(dtype), scale))
    return updates


def _fresh(client: ClientData, name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> Update:
    p, q = shape
    if client.rank is None:
        return torch.zeros(p, q, dtype=dtype)
    A = torch.empty(client.rank, q, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=derive(seed, client.name, name))
    return LowRank(torch.zeros(p, client.rank, dtype=dtype), A, client.scale())


def _read_start(client: ClientData, targets: Sequence[str]) -> Mapping[str, LowRank]:
    assert client.start is not None
    try:
        _, updates = read_lora(client.start)
    except AdapterError as error:
        raise AdapterError(f"client {client.name!r}: {error}") from error
    if odd := set(updates) ^ set(targets):
        what = "lacks" if min(odd) in targets else "has"
        raise AdapterError(f"client {client.name!r}: {str(client.start)!r} {what} {min(odd)!r}, unlike the targets")
    return updates
