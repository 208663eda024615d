"""Training jobs: each client's data and adapter, the schedule of all clients, and the order of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import ceil, sqrt
from pathlib import Path

import torch
from torch import Tensor

from clairlib.core.seeds import derive

NO_LABEL = -100  # the index that torch's cross entropy ignores
KEYS = {"input_ids", "labels", "attention_mask"}


@dataclass(frozen=True)
class ClientData:
    """One client's examples, and the adapter to be trained on them.

    Attributes
    ----------
    name : str
        Name of the client's random draws and of its adapter folder.
    examples, validation : sequence of mappings
        ``input_ids`` (T,) and ``labels``. Labels are (T,) as in `transformers` (-100: no label; causal models shift
        them themselves), or one class (). ``attention_mask`` (T,) is optional. With validation examples the weights
        with the least loss on them among all checks are kept (early stopping).
    rank : int or None
        Adapter rank rho of every target; None trains a full-matrix update (p, q), which is kept in memory only.
    alpha, use_rslora
        The update is scale * B @ A with scale alpha / rho, or alpha / sqrt(rho) with rsLoRA.
    start : Path or None
        PEFT adapter folder to start from. Its ranks and scales then replace the three settings above.
    """

    name: str
    examples: Sequence[Mapping[str, Tensor]] = field(repr=False)
    rank: int | None = 8
    alpha: float = 16.0
    use_rslora: bool = False
    validation: Sequence[Mapping[str, Tensor]] = field(default=(), repr=False)
    start: Path | None = None

    def scale(self) -> float:
        """Return the factor of B @ A; 1 for a full-matrix update."""
        return 1.0 if self.rank is None else self.alpha / (sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Schedule:
    """Training schedule of every client, for AdamW with torch's betas and eps.

    Attributes
    ----------
    steps, epochs : int, int or None
        Optimiser steps of each client, and passes over its examples; if both are given, the smaller number counts.
    batch : int or None
        Examples per step; the last step of an epoch takes the remaining ones. None: all examples of the client.
    accumulate : int
        Number of parts in which a step's batch goes through the model. The loss is the mean over all labels of the
        step, so this changes memory only.
    max_norm : float or None
        Each client's gradient, over all its modules, is clipped to this norm.
    check_every : int
        Steps between two checks of the validation loss; there is also one after the last step.
    """

    steps: int
    batch: int | None = None
    accumulate: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    max_norm: float | None = None
    check_every: int = 10
    epochs: int | None = None

    def steps_of(self, client: ClientData) -> int:
        """Return the number of optimiser steps of this client."""
        if self.epochs is None:
            return self.steps
        return min(self.steps, self.epochs * ceil(len(client.examples) / (self.batch or len(client.examples))))

    def is_full_batch(self, client: ClientData) -> bool:
        """Return whether all steps of this client see the same examples."""
        return self.batch is None or self.batch >= len(client.examples)


def batches(client: ClientData, schedule: Schedule, *, seed: int) -> Iterator[list[int]]:
    """Yield the examples of the client's steps, without end: epochs in random order, drawn by ``(name, "order")``.

    If a batch holds all examples, every step has them in their own order.
    """
    count = len(client.examples)
    if schedule.is_full_batch(client):
        yield from repeat(list(range(count)))
    assert schedule.batch is not None
    draws = derive(seed, client.name, "order")
    while True:
        order = torch.randperm(count, generator=draws).tolist()
        yield from (order[at : at + schedule.batch] for at in range(0, count, schedule.batch))


def check_jobs(clients: Sequence[ClientData], schedule: Schedule, *, shift: bool, classes: bool) -> None:
    """Raise ValueError for what cannot be trained, in one line that names the client or the setting.

    ``shift`` and ``classes`` are those of `clairlib.training.targets.loss_kind`.
    """
    for name in ("steps", "batch", "accumulate", "check_every", "epochs"):
        value = getattr(schedule, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not clients:
        raise ValueError("no client to train")
    names = [client.name for client in clients]
    if len(set(names)) < len(names):
        raise ValueError(f"two clients have the name {next(name for name in names if names.count(name) > 1)!r}")
    kinds = {client.rank is None: client.name for client in clients}
    if len(kinds) == 2:
        raise ValueError(f"client {kinds[True]!r} has a full-matrix update and {kinds[False]!r} not; train them apart")
    for client in clients:
        _check_client(client, shift, classes)


def _check_client(client: ClientData, shift: bool, classes: bool) -> None:
    name = client.name
    if not name or name[0] == "." or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} cannot be a client's name, as it names a folder")
    if client.rank is not None and client.rank < 1:
        raise ValueError(f"client {name!r} has rank {client.rank}; it must be at least 1")
    if client.rank is None and client.start is not None:
        raise ValueError(f"client {name!r}: a full-matrix update cannot start from an adapter folder")
    if not client.examples:
        raise ValueError(f"client {name!r} has no examples")
    for kind, examples in (("example", client.examples), ("validation example", client.validation)):
        for index, example in enumerate(examples):
            if problem := _problem(example, shift, classes):
                raise ValueError(f"client {name!r}: {kind} {index} {problem}")


def _problem(example: Mapping[str, Tensor], shift: bool, classes: bool) -> str | None:
    if unknown := set(example) - KEYS:
        return f"has {min(unknown)!r}; only {', '.join(sorted(KEYS))} are used"
    if missing := {"input_ids", "labels"} - set(example):
        return f"lacks {min(missing)!r}"
    tokens, labels = example["input_ids"], example["labels"]
    if tokens.dim() != 1 or not len(tokens):
        return f"has input_ids of shape {tuple(tokens.shape)}, expected (T,)"
    if labels.is_floating_point():
        return "has labels that are not integers"
    expected = () if classes else tuple(tokens.shape)
    if tuple(labels.shape) != expected:
        return f"has labels of shape {tuple(labels.shape)}, expected {expected}"
    mask = example.get("attention_mask", tokens)
    if mask.shape != tokens.shape:
        return f"has an attention_mask of shape {tuple(mask.shape)}, expected {tuple(tokens.shape)}"
    if not classes and not bool((labels[1:] if shift else labels).ne(NO_LABEL).any()):
        return "has no label" + (" after its first token" if shift else "")
    return None
