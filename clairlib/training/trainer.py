"""Train K clients' LoRA adapters on one frozen base at once, with the result of training each client by itself.

The part below the first adapted module runs once and is cached (`frozen_prefix`, `activations`). The rest runs for many
clients together, with each low-rank product part of a grouped product (`grouped_lora`). Clients share no parameter, so
the gradient of the sum of their losses gives each client its own gradient. Dropout is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clairlib.core import state_file
from clairlib.linalg.low_rank import LowRank
from clairlib.training.activations import Activations, Recorder, Slot, fill
from clairlib.training.batches import Group, Item, collate, split
from clairlib.training.grouped_lora import LoraStacks, Update, are_finite
from clairlib.training.preparation import CACHE_BYTES, GROUP_TOKENS, Preparation, prepare
from clairlib.training.saving import TrainedClient
from clairlib.training.schedule import ClientData, Schedule, batches
from clairlib.training.suffix import Suffix
from clairlib.training.targets import initial_updates

CHECKPOINT_SECONDS = 30.0
DIVERGED = 100.0  # training diverged if the loss exceeds this many times max(first loss, 1 nat)


def train_adapters(
    model: Any, clients: Sequence[ClientData], targets: Sequence[str] | str, schedule: Schedule, *, seed: int,
    device: str = "cpu", autocast: torch.dtype | None = None, group_tokens: int = GROUP_TOKENS,
    cache_bytes: int = CACHE_BYTES, checkpoint: Path | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[TrainedClient]:  # fmt: skip
    """Train every client's adapter of the targets by AdamW, as if each were trained by itself through the whole model.

    Parameters
    ----------
    model : a `transformers` model for causal or masked language modelling, token or sequence classification
        It is not changed.
    targets : list of module names or their ends, regular expression, or "all-linear", as in peft's ``target_modules``
    seed : int
        Seed of the initial factors, drawn by (client's name, module's name), and of the order of data, by (name,
        "order").
    autocast : torch.dtype or None
        Dtype of products by ``torch.autocast``. Parameters and AdamW keep their own dtype.
    group_tokens : int
        Most tokens that go through the model together, but at least one example. Changes memory and rounding only.
    cache_bytes : int
        Most memory for the frozen part's activations. Larger ones lie in a file (TMPDIR).
    checkpoint : Path or None
        File that keeps the state, written every CHECKPOINT_SECONDS and at the end. If it exists, training goes on from
        it, with the same result. Remove it when the adapters are saved.
    progress : callable, optional
        Called with the number of steps done and their total, over all clients.

    Returns
    -------
    list of TrainedClient
        In the clients' order. Training of a client stops without updates if its loss or its final weights are not
        finite, or if its loss exceeds DIVERGED times the first one (at least 1 nat). This does not affect the other
        clients.

    Raises
    ------
    ValueError
        A client, module, setting or checkpoint cannot be used; one line names it.
    OSError
        The activations fit neither into ``cache_bytes`` nor on the disk.
    """
    options: dict[str, Any] = {"device": device, "autocast": autocast}
    options |= {"group_tokens": group_tokens, "cache_bytes": cache_bytes}
    run = Run(prepare(model, clients, targets, schedule, **options), seed=seed)
    keeper = _Keeper(run, checkpoint, seed)
    try:
        keeper.resume()
        while run.stacks.clients:
            run.step()
            keeper.save_now_and_then()
            if progress is not None:
                progress(run.done, run.total)
        keeper.save()
    finally:
        run.close()
    return [run.result(k) for k in range(len(clients))]


class Run:
    """State of training: the clients still in training, the step, and the results of the other clients."""

    def __init__(self, plan: Preparation, *, seed: int) -> None:
        self.plan, self.clients, self.schedule = plan, plan.clients, plan.schedule
        self.steps = [plan.schedule.steps_of(client) for client in plan.clients]
        self.total, self.taken = sum(self.steps), 0
        self.orders = [batches(client, plan.schedule, seed=seed) for client in plan.clients]
        self.losses = np.full((len(plan.clients), max(self.steps)), np.nan)
        self.best = np.full(len(plan.clients), np.inf)
        self.best_step: list[int | None] = [None] * len(plan.clients)
        self.updates: dict[int, dict[str, Update]] = {}
        self.diverged: dict[int, int] = {}
        how: dict[str, Any] = {"learning_rate": self.schedule.learning_rate, "weight_decay": self.schedule.weight_decay}
        start = initial_updates(plan.model, plan.targets, plan.clients, seed=seed)
        self.stacks = LoraStacks(start, device=plan.device, **how)
        self.dtype = self.stacks.flat[0].dtype
        self.activations = self._activations()
        own = plan.plan
        self.suffix = Suffix(plan.twin, plan.targets, own.shortcuts, outputs=own.outputs, autocast=plan.autocast)
        self.kept: tuple[tuple[int, ...], list[tuple[Group, dict[Slot, Tensor]]]] = ((), [])

    def _activations(self) -> Activations | None:
        plan, shortcuts = self.plan, self.plan.plan.shortcuts
        if shortcuts.cut is None:
            return None
        kept = Activations(plan.plan.widths, len(plan.rows.ids), device=plan.device, limit=plan.cache_bytes)
        with Recorder(plan.twin, shortcuts.cut, unmasked=shortcuts.unmasked, autocast=plan.autocast) as record:
            fill(kept, record, plan.table, plan.group_tokens)
        return kept

    @property
    def done(self) -> int:
        """Number of steps done over all clients; a client that diverged counts with all its steps."""
        return sum(own if k in self.diverged else min(own, self.taken) for k, own in enumerate(self.steps))

    def step(self) -> None:
        """Take one optimiser step of every client still in training."""
        losses = torch.zeros(len(self.stacks.clients), dtype=torch.float64, device=self.plan.device)
        for group, values in self.groups():
            leaves = self.stacks.load(self.suffix.layers, group.positions)
            own = self.suffix.losses(group, values)
            self.stacks.accumulate(group.positions, torch.autograd.grad(own.sum(), leaves))
            losses[self.stacks.index(group.positions)] += own.detach()
        self.stacks.step(self.schedule.max_norm)
        self.losses[self.stacks.clients, self.taken] = losses.cpu().numpy()
        self.taken += 1
        self._give_up_diverged()
        self._validate()
        self._let_finished_go()

    def groups(self) -> Iterator[tuple[Group, dict[Slot, Tensor]]]:
        """Return the step's groups with their cached values."""
        active = tuple(self.stacks.clients)
        places = [[self.plan.examples[k][e] for e in next(self.orders[k])] for k in active]
        if not self.plan.keeps_groups:
            return self._collated(places, self.schedule.accumulate)
        if self.kept[0] != active:
            self.kept = (active, list(self._collated(places, self.schedule.accumulate)))
        return iter(self.kept[1])

    def _collated(self, places: Sequence[Sequence[int]], parts: int) -> Iterator[tuple[Group, dict[Slot, Tensor]]]:
        """Yield groups of the examples of every position in the stack, in ``parts`` parts."""
        rows = self.plan.rows
        for part in range(parts):
            items = []
            for position, own in enumerate(places):
                size = -(-len(own) // parts)
                if mine := own[part * size : (part + 1) * size]:
                    items.append(Item(position, tuple(mine), int(rows.labelled[list(own)].sum())))
            for group in split(rows, items, self.plan.group_tokens):
                collated = collate(rows, group).to(self.plan.device, self.dtype)
                yield collated, self.activations.gather(collated) if self.activations is not None else {}

    def _give_up_diverged(self) -> None:
        active = self.stacks.clients
        now, first = self.losses[active, self.taken - 1], self.losses[active, 0]
        sound = (now <= DIVERGED * np.maximum(first, 1.0)).tolist()  # false for nan
        self.diverged |= {k: self.taken for k, fine in zip(active, sound, strict=True) if not fine}
        self.stacks.keep([position for position, fine in enumerate(sound) if fine])

    @torch.no_grad()
    def _validate(self) -> None:
        """Save the weights of clients whose validation loss is the least so far."""
        active, now = self.stacks.clients, self.taken % self.schedule.check_every == 0
        due = [p for p, k in enumerate(active) if self.clients[k].validation and (now or self.taken == self.steps[k])]
        if not due:
            return
        found = torch.zeros(len(active), dtype=torch.float64, device=self.plan.device)
        places = [self.plan.validation[k] if p in due else [] for p, k in enumerate(active)]
        for group, values in self._collated(places, 1):
            self.stacks.load(self.suffix.layers, group.positions)
            found[self.stacks.index(group.positions)] += self.suffix.losses(group, values)
        if better := [p for p in due if found[p].item() < self.best[active[p]]]:
            for p in better:
                self.best[active[p]], self.best_step[active[p]] = found[p].item(), self.taken
            self.stacks.remember(better)

    def _let_finished_go(self) -> None:
        staying = []
        for position, k in enumerate(self.stacks.clients):
            if self.taken < self.steps[k]:
                staying.append(position)
            elif are_finite(updates := self.stacks.update(position, best=self.best_step[k] is not None)):
                self.updates[k] = updates
            else:
                self.diverged[k] = self.taken
        self.stacks.keep(staying)

    def result(self, k: int) -> TrainedClient:
        """Return the result of client k."""
        client, at = self.clients[k], self.diverged.get(k)
        losses = torch.from_numpy(self.losses[k, : at or self.steps[k]].copy())
        return TrainedClient(client.name, self.updates.get(k, {}), losses, at, self.best_step[k], client.use_rslora)

    def close(self) -> None:
        """Remove the activations on disk, if any."""
        if self.activations is not None:
            self.activations.close()


class _Keeper:
    """Keeps the state of a run in its checkpoint file, or does nothing without a file."""

    def __init__(self, run: Run, path: Path | None, seed: int) -> None:
        self.run, self.path, self.last = run, path, time.monotonic()
        self.fingerprint = "" if path is None else _fingerprint(run.plan, seed)

    def save_now_and_then(self) -> None:
        """Save if the last save was at least CHECKPOINT_SECONDS ago."""
        if time.monotonic() - self.last >= CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write everything that the rest of the run depends on."""
        if self.path is None:
            return
        run, scales = self.run, {}
        own_losses = {"losses": torch.from_numpy(run.losses), "best_losses": torch.from_numpy(run.best)}
        tensors = run.stacks.packed() | own_losses
        for k, updates in run.updates.items():
            scales[str(k)] = {module: own.scale for module, own in updates.items() if isinstance(own, LowRank)}
            for module, update in updates.items():
                factors = {"A": update.A, "B": update.B} if isinstance(update, LowRank) else {"D": update}
                tensors |= {f"{k}/{module}/{factor}": value for factor, value in factors.items()}
        facts = {"fingerprint": self.fingerprint, "taken": run.taken, "clients": run.stacks.clients, "scales": scales}
        facts |= {"diverged": run.diverged, "best_step": run.best_step}
        state_file.save(self.path, tensors, facts)
        self.last = time.monotonic()

    def resume(self) -> None:
        """Bring the run to the state in the file, if the file exists."""
        if self.path is None or not self.path.exists():
            return
        tensors, facts = state_file.load(self.path, self.fingerprint)
        run = self.run
        run.taken, run.losses, run.best = facts["taken"], tensors["losses"].numpy(), tensors["best_losses"].numpy()
        run.stacks.unpack(tensors, facts["clients"], run.taken)
        run.best_step, run.diverged = facts["best_step"], {int(k): at for k, at in facts["diverged"].items()}
        for k, scales in facts["scales"].items():
            own: dict[str, Update] = {}
            for key in (key for key in tensors if key.startswith(f"{k}/")):
                module, _, factor = key.removeprefix(f"{k}/").rpartition("/")
                if factor == "D":
                    own[module] = tensors[key]
                elif factor == "A":
                    own[module] = LowRank(tensors[f"{k}/{module}/B"], tensors[key], scales[module])
            run.updates[int(k)] = own
        for k in run.stacks.clients:
            next(islice(run.orders[k], run.taken - 1, run.taken))


def _fingerprint(plan: Preparation, seed: int) -> str:
    """Return a hash of all that decides the result: settings, data, and a sample of every parameter of the model."""
    clients = [{key: getattr(c, key) for key in ("name", "rank", "alpha", "use_rslora", "start")} for c in plan.clients]
    facts = {
        "seed": seed, "schedule": asdict(plan.schedule), "targets": plan.targets, "clients": clients,
        "device": plan.device, "autocast": plan.autocast, "group_tokens": plan.group_tokens, "torch": torch.__version__,
        "examples": [(own.start, own.stop) for own in (*plan.examples, *plan.validation)],
    }  # fmt: skip
    table = [t for t in vars(plan.table).values() if isinstance(t, np.ndarray)]
    weights = (w.detach().flatten()[:: max(1, w.numel() // 1024)] for w in plan.model.parameters())
    return state_file.digest(facts, [*map(torch.from_numpy, table), *weights])
