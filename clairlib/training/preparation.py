"""Preparation before the first step: targets, table of tokens, cut of the model, and memory needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    """Bytes that training takes in addition to the model."""

    adapters: int  # parameters, gradients and AdamW's moments of all clients, and the best weights if clients validate
    cache: int  # activations of the frozen part; twice that if every step sees all examples, as groups are then kept
    on_disk: bool  # whether the cache is memory-mapped files
    group: int  # activations of the largest group, estimated from what the probe's backward pass kept

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

    @property
    def keeps_groups(self) -> bool:
        """Whether groups and their cached values are kept from step to step."""
        return self._cache <= self.cache_bytes and all(map(self.schedule.is_full_batch, self.clients))

    @property
    def _cache(self) -> int:
        return size_of(self.plan.widths, len(self.rows.ids))

    @property
    def memory(self) -> Memory:
        """Memory that the run takes."""
        clients, rows = self.clients, self.rows
        sizes = [self.model.get_submodule(name).weight for name in self.targets]
        largest = max((client.rank or 0 for client in clients), default=0)
        entries = sum(largest * sum(w.shape) if largest else w.numel() for w in sizes) * len(clients)
        copies = MOMENTS_AND_GRADIENT + any(client.validation for client in clients)
        itemsize = max(sizes[0].dtype.itemsize, 4)
        batch = max(min(self.schedule.batch or len(client.examples), len(client.examples)) for client in clients)
        longest = int(rows.lengths.max())
        most = max(min(self.group_tokens, len(clients) * batch * longest), longest)
        share = float((rows.labelled / rows.lengths).max()) if self.plan.shortcuts.select else 1.0
        logits = LOGITS * share * num_labels(self.model, classes=rows.classes is not None) * itemsize
        cache, group = self._cache * (1 + self.keeps_groups), int(most * (BACKWARD * self.plan.saved + logits))
        return Memory(entries * copies * itemsize, cache, self._cache > self.cache_bytes, group)


def prepare(
    model: Any, clients: Sequence[ClientData], targets: Sequence[str] | str, schedule: Schedule, *,
    device: str = "cpu", autocast: torch.dtype | None = None, group_tokens: int = GROUP_TOKENS,
    cache_bytes: int = CACHE_BYTES,
) -> Preparation:  # fmt: skip
    """Check all inputs of `train_adapters` and plan the run; raise ValueError if something cannot be trained."""
    shift, classes = loss_kind(model)
    check_jobs(clients, schedule, shift=shift, classes=classes)
    names = target_names(model, targets)
    pad = getattr(model.config, "pad_token_id", None) or 0
    every = [e for client in clients for e in client.examples] + [e for client in clients for e in client.validation]
    table = tabulate(every, shift=shift, classes=classes, pad=pad)
    counts = [len(own) for own in (*(c.examples for c in clients), *(c.validation for c in clients))]
    places = [range(stop - count, stop) for stop, count in zip(accumulate(counts), counts, strict=True)]
    _check_tokens(model, clients, table, places)
    twin = shared_copy(model, device)
    own_masks = not table.attended.all()
    probe = Probe(twin, names, shift=shift, classes=classes, pad=pad, device=device, own_masks=own_masks)
    plan, K = probe.plan(autocast), len(clients)
    rows = table.only_labelled() if plan.shortcuts.cut is not None and plan.shortcuts.cut.single else table
    return Preparation(
        model, twin, clients, schedule, names, device, autocast, group_tokens, cache_bytes, table, rows, places[:K],
        places[K:], plan,
    )  # fmt: skip


def memory_needed(
    model: Any, clients: Sequence[ClientData], targets: Sequence[str] | str, schedule: Schedule, **options: Any
) -> Memory:
    """Return the memory that `train_adapters` takes; ``options`` are those of `prepare`. Its str() is one line."""
    return prepare(model, clients, targets, schedule, **options).memory


def _check_tokens(model: Any, clients: Sequence[ClientData], table: Table, places: Sequence[range]) -> None:
    """Raise ValueError for tokens, classes and lengths that the model lacks; on a GPU they would end the process."""

    def owner(place: int) -> tuple[str, int]:
        k = next(k for k, own in enumerate(places) if place in own)
        return f"client {clients[k % len(clients)].name!r}", place - places[k].start

    tokens = model.get_input_embeddings().num_embeddings
    kinds = num_labels(model, classes=table.classes is not None)
    wrong = np.add.reduceat((table.ids < 0) | (table.ids >= tokens), table.starts) > 0
    labels = table.targets if table.classes is None else table.classes
    bad = (labels != NO_LABEL) & ((labels < 0) | (labels >= kinds))
    bad = np.add.reduceat(bad, table.starts) > 0 if table.classes is None else bad
    for what, examples, bound in (("a token", wrong, tokens), ("a label", bad, kinds)):
        if examples.any():
            name, index = owner(int(np.flatnonzero(examples)[0]))
            raise ValueError(f"{name}: example {index} has {what} outside 0 .. {bound - 1}")
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and table.lengths.max() > room:
        name, _ = owner(int(table.lengths.argmax()))
        raise ValueError(f"{name}: an example has {table.lengths.max()} tokens, the model takes at most {room}")
