"""Preparation before the first step: targets, table of tokens, cut of the model, and memory needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clairlib.training.activations import size_of
from clairlib.training.batches import Table, tabulate
from clairlib.training.probe import Plan, Probe
from clairlib.training.schedule import NO_LABEL, ClientData, Schedule, check_jobs
from clairlib.training.suffix import shared_copy
from clairlib.training.targets import loss_kind, num_labels, target_names

GROUP_TOKENS = 8192
CACHE_BYTES = 2**31
MOMENTS_AND_GRADIENT = 4  # a parameter, its gradient, and AdamW's two moments
BACKWARD = 2.0  # peak memory over what the forward pass keeps; up to 1.7 was measured
LOGITS = 3  # logits, their log-softmax and their gradient


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes in addition to the model.

    Attributes
    ----------
    adapters : int
        Parameters, gradients and AdamW's moments of all clients, and the best weights if clients validate.
    cache : int
        Activations of the frozen part; twice that if every step sees all examples, because groups are then kept.
    on_disk : bool
        Whether the cache is a memory-mapped file.
    group : int
        Activations of the largest group, estimated from what the probe's backward pass kept.
    """

    adapters: int
    cache: int
    on_disk: bool
    group: int

    @property
    def total(self) -> int:
        """Bytes of memory, without those on disk."""
        return self.adapters + self.group + (0 if self.on_disk else self.cache)

    def __str__(self) -> str:
        where = "on disk" if self.on_disk else "in memory"
        parts = f"adapters and AdamW {_size(self.adapters)}, cached activations {_size(self.cache)} {where}"
        return f"{parts}, a group's activations about {_size(self.group)}; in memory {_size(self.total)} in all"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


@dataclass(frozen=True)
class Preparation:
    """Checked model, clients and settings of a run, and the plan for it.

    ``twin`` is the model that runs, a copy around the same weights. ``table`` holds all clients' examples, followed by
    all validation examples. ``rows`` is the same table with the rows that go through the model after the cut.
    ``examples`` and ``validation`` hold each client's positions in the table.
    """

    model: Any
    twin: Any
    clients: Sequence[ClientData]
    schedule: Schedule
    targets: list[str]
    device: str
    autocast: torch.dtype | None
    group_tokens: int
    cache_bytes: int
    table: Table
    rows: Table
    examples: list[range]
    validation: list[range]
    plan: Plan
    memory: Memory

    @property
    def keeps_groups(self) -> bool:
        """Whether groups and their cached values are kept from step to step."""
        return _keeps_groups(self.clients, self.schedule, self.memory.on_disk)


def prepare(
    model: Any,
    clients: Sequence[ClientData],
    targets: Sequence[str] | str,
    schedule: Schedule,
    *,
    device: str,
    autocast: torch.dtype | None,
    group_tokens: int,
    cache_bytes: int,
) -> Preparation:
    """Check all inputs and plan the run; raise ValueError if something cannot be trained."""
    shift, classes = loss_kind(model)
    check_jobs(clients, schedule, shift=shift, classes=classes)
    names = target_names(model, targets)
    pad = getattr(model.config, "pad_token_id", None) or 0
    every = [e for client in clients for e in client.examples] + [e for client in clients for e in client.validation]
    table = tabulate(every, shift=shift, classes=classes, pad=pad)
    examples = _places([len(client.examples) for client in clients], 0)
    validation = _places([len(client.validation) for client in clients], examples[-1].stop)
    _check_tokens(model, clients, table, [*examples, *validation])
    twin = shared_copy(model, device)
    own_masks = not table.attended.all()
    probe = Probe(twin, names, shift=shift, classes=classes, pad=pad, device=device, own_masks=own_masks)
    plan = probe.plan(autocast)
    rows = table.only_labelled() if plan.shortcuts.cut is not None and plan.shortcuts.cut.single else table
    memory = _memory(model, clients, names, schedule, plan, rows, group_tokens, cache_bytes)
    return Preparation(
        model, twin, clients, schedule, names, device, autocast, group_tokens, cache_bytes, table, rows, examples,
        validation, plan, memory,
    )  # fmt: skip


def memory_needed(
    model: Any,
    clients: Sequence[ClientData],
    targets: Sequence[str] | str,
    schedule: Schedule,
    *,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    group_tokens: int = GROUP_TOKENS,
    cache_bytes: int = CACHE_BYTES,
) -> Memory:
    """Return the memory that `train_adapters` takes with these arguments; its str() is one line."""
    return prepare(
        model, clients, targets, schedule, device=device, autocast=autocast, group_tokens=group_tokens,
        cache_bytes=cache_bytes,
    ).memory  # fmt: skip


def _places(counts: list[int], first: int) -> list[range]:
    stops = [first + int(stop) for stop in np.cumsum(counts)]
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _check_tokens(model: Any, clients: Sequence[ClientData], table: Table, places: Sequence[range]) -> None:
    """Raise ValueError for tokens, classes and lengths that the model does not have.

    On a GPU they would end the process.
    """
    tokens = model.get_input_embeddings().num_embeddings
    kinds = num_labels(model, classes=table.classes is not None)
    wrong = np.add.reduceat((table.ids < 0) | (table.ids >= tokens), table.starts) > 0
    problem = {"a token": (wrong, tokens)}
    labels = table.targets if table.classes is None else table.classes
    bad = (labels != NO_LABEL) & ((labels < 0) | (labels >= kinds))
    problem["a label"] = (np.add.reduceat(bad, table.starts) > 0 if table.classes is None else bad, kinds)
    for what, (wrong, bound) in problem.items():
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            owner = next(k for k, own in enumerate(places) if place in own)
            where = f"client {clients[owner % len(clients)].name!r}: example {place - places[owner].start}"
            raise ValueError(f"{where} has {what} outside 0 .. {bound - 1}")
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and table.lengths.max() > room:
        place = int(table.lengths.argmax())
        owner = next(k for k, own in enumerate(places) if place in own)
        name, length = clients[owner % len(clients)].name, table.lengths[place]
        raise ValueError(f"client {name!r}: an example has {length} tokens, the model takes at most {room}")


def _keeps_groups(clients: Sequence[ClientData], schedule: Schedule, on_disk: bool) -> bool:
    return not on_disk and all(schedule.is_full_batch(client) for client in clients)


def _memory(
    model: Any,
    clients: Sequence[ClientData],
    targets: Sequence[str],
    schedule: Schedule,
    plan: Plan,
    rows: Table,
    group_tokens: int,
    cache_bytes: int,
) -> Memory:
    sizes = [model.get_submodule(name).weight for name in targets]
    largest = max((client.rank or 0 for client in clients), default=0)
    entries = sum(largest * sum(w.shape) if largest else w.numel() for w in sizes) * len(clients)
    copies = MOMENTS_AND_GRADIENT + any(client.validation for client in clients)
    cache = size_of(plan.widths, len(rows.ids))
    on_disk = cache > cache_bytes
    if _keeps_groups(clients, schedule, on_disk):
        cache *= 2
    itemsize = max(sizes[0].dtype.itemsize, 4)
    batch = max(min(schedule.batch or len(client.examples), len(client.examples)) for client in clients)
    longest = int(rows.lengths.max())
    most = max(min(group_tokens, len(clients) * batch * longest), longest)
    share = float((rows.labelled / rows.lengths).max()) if plan.shortcuts.select else 1.0
    logits = LOGITS * share * num_labels(model, classes=rows.classes is not None) * itemsize
    return Memory(entries * copies * itemsize, cache, on_disk, int(most * (BACKWARD * plan.saved + logits)))
