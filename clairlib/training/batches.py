"""Clients' examples as one table of tokens, and groups of clients whose batches go through the model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clairlib.training.schedule import NO_LABEL


@dataclass(frozen=True)
class Table:
    """The R tokens of all E examples, one row per token, one example after another."""

    ids: np.ndarray  # (R,)
    targets: np.ndarray  # (R,), the label to predict at each token (NO_LABEL: none)
    classes: np.ndarray | None  # (E,), one label per example instead of targets
    attended: np.ndarray  # (R,), the attention mask as bool
    starts: np.ndarray  # (E,), the first row of each example
    lengths: np.ndarray  # (E,), its number of rows
    labelled: np.ndarray  # (E,), its number of labels
    pad: int  # padding token
    single: bool = False  # whether rows are single labelled positions instead of sequences

    def only_labelled(self) -> Table:
        """Return the table of the labelled positions alone."""
        keep = self.targets != NO_LABEL
        starts = np.concatenate([[0], np.cumsum(self.labelled)])[:-1]
        ids, attended = np.full(keep.sum(), self.pad), np.ones(keep.sum(), dtype=bool)
        return Table(ids, self.targets[keep], None, attended, starts, self.labelled, self.labelled, self.pad, True)


def tabulate(examples: Sequence[Mapping[str, Tensor]], *, shift: bool, classes: bool, pad: int) -> Table:
    """Collect all examples in one table; with ``shift`` the target of a position is the label of the next token."""
    lengths = np.array([len(example["input_ids"]) for example in examples])
    ids = _flat([example["input_ids"] for example in examples])
    masks = [example.get("attention_mask", torch.ones(len(example["input_ids"]))) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    labels = np.array([int(e["labels"]) for e in examples]) if classes else None
    targets = np.full(len(ids), NO_LABEL) if classes else _flat([example["labels"] for example in examples])
    if shift:
        targets = np.append(targets[1:], NO_LABEL)
        targets[starts + lengths - 1] = NO_LABEL
    labelled = np.ones_like(lengths) if classes else np.add.reduceat(targets != NO_LABEL, starts, dtype=np.int64)
    return Table(ids, targets, labels, _flat(masks) != 0, starts, lengths, labelled, pad)


def _flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().cpu().long() for tensor in tensors]).numpy()


@dataclass(frozen=True)
class Item:
    """Part of one client's step: its position in the stack, its examples, and the labels of its whole step."""

    position: int
    examples: tuple[int, ...]
    labels: int


@dataclass(frozen=True)
class Group:
    """Padded sequences of G clients, the same number b for each, client after client."""

    positions: tuple[int, ...]  # the clients' positions in the stack
    rows: Tensor  # (G * b, T), the row of the table for every token; padding repeats a row of the same client
    ids: Tensor  # (G * b, T)
    attended: Tensor | None  # (G * b, T), the attention mask; None if every token is attended to
    select: Tensor | None  # (G * s,), positions of the targets among all tokens; None: every token has a target
    targets: Tensor  # (G, s), labels
    weights: Tensor  # (G, s), the weight of each label in its client's loss; 0 for padding

    def to(self, device: str, dtype: torch.dtype) -> Group:
        """Return the group on a device, with weights of a dtype."""
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        moved["weights"] = moved["weights"].to(dtype)
        return Group(**{**vars(self), **moved})


def split(table: Table, items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Divide the items into groups of at most ``limit`` padded tokens.

    Large items are cut up, but one example is never cut. Items of similar size come together, so there is little
    padding. A client has at most one item in a group.
    """
    groups: list[list[Item]] = []
    for found in zip_longest(*(_cut(table, item, limit) for item in items)):
        parts, shape = [part for part in found if part is not None], (0, 0)
        parts.sort(key=lambda part: (*_shape(table, part), -part.position), reverse=True)
        for part in parts:
            own = _shape(table, part)
            shape = (max(shape[0], own[0]), max(shape[1], own[1]))
            if part is parts[0] or (len(groups[-1]) + 1) * shape[0] * shape[1] > limit:
                groups.append([])
                shape = own
            groups[-1].append(part)
    return [sorted(group, key=lambda part: part.position) for group in groups]


def _shape(table: Table, item: Item) -> tuple[int, int]:
    """Return (T, b) of the item's examples, or (1, b) for single rows."""
    lengths = table.lengths[list(item.examples)]
    return (1, int(lengths.sum())) if table.single else (int(lengths.max()), len(lengths))


def _cut(table: Table, item: Item, limit: int) -> list[Item]:
    """Cut the item into parts of at most ``limit`` tokens, or of one example."""
    parts: list[list[int]] = [[]]
    total = longest = 0
    for example in item.examples:
        length = int(table.lengths[example])
        total, longest = total + length, max(longest, length)
        if parts[-1] and (total if table.single else longest * (len(parts[-1]) + 1)) > limit:
            parts.append([])
            total = longest = length
        parts[-1].append(example)
    return [Item(item.position, tuple(part), item.labels) for part in parts]


def collate(table: Table, items: Sequence[Item]) -> Group:
    """Pad the items' examples to common sizes and return them as a group."""
    shares = np.array([[1.0 / item.labels] for item in items])  # (G, 1)
    fields = (_collated_rows if table.single else _collated_sequences)(table, items, shares)
    tensors: list[Any] = [None if field is None else torch.from_numpy(field) for field in fields]
    return Group(tuple(item.position for item in items), *tensors)


def _collated_rows(table: Table, items: Sequence[Item], shares: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """Return the fields of the group after its positions."""
    parts = [np.concatenate([np.arange(table.lengths[e]) + table.starts[e] for e in item.examples]) for item in items]
    size = max(map(len, parts))
    rows = np.stack([np.append(part, np.repeat(part[:1], size - len(part))) for part in parts])  # (G, s)
    real = np.arange(size) < np.array([[len(part)] for part in parts])
    column, weights = rows.reshape(-1, 1), np.where(real, shares, 0.0)
    return column, table.ids[column], None, None, table.targets[rows], weights


def _collated_sequences(table: Table, items: Sequence[Item], shares: np.ndarray) -> tuple[np.ndarray | None, ...]:
    b = max(len(item.examples) for item in items)
    examples = np.array([[*item.examples, *item.examples[:1] * (b - len(item.examples))] for item in items])  # (G, b)
    real = np.arange(b) < np.array([[len(item.examples)] for item in items])
    lengths = table.lengths[examples].reshape(-1, 1)
    place = np.arange(lengths.max())
    rows = table.starts[examples].reshape(-1, 1) + np.minimum(place, lengths - 1)  # (G * b, T)
    inside = place < lengths
    attended = inside & table.attended[rows]
    ids = np.where(inside, table.ids[rows], table.pad)
    mask = None if attended.all() else attended.astype(np.int64)
    if table.classes is not None:
        return rows, ids, mask, None, table.classes[examples], real * shares
    select, weights = _labelled(table.targets[rows], inside & real.reshape(-1, 1), shares)
    return rows, ids, mask, select, table.targets[rows].reshape(-1)[select].reshape(len(items), -1), weights


def _labelled(targets: np.ndarray, real: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat positions (G * s,) of every client's labels among the tokens, and their weights (G, s).

    A client with fewer than s labels repeats its first one with weight 0.
    """
    mine = ((targets != NO_LABEL) & real).reshape(len(shares), -1)
    counts = mine.sum(axis=1)
    places = [np.flatnonzero(own) + client * mine.shape[1] for client, own in enumerate(mine)]
    size = int(counts.max())
    select = np.concatenate([np.append(own, np.repeat(own[:1], size - len(own))) for own in places])
    return select, np.where(np.arange(size) < counts[:, None], shares, 0.0)
