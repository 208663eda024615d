"""Decide which cut of the model is right, by comparing losses and gradients with those of the whole model.

The probe is a small batch of random tokens for two clients with random adapters, so it does not depend on the data. It
reveals a cut that loses an adapter's influence, or that lets one client's tokens meet another client's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import LowRank
from clairlib.training.activations import Recorder, Slot
from clairlib.training.batches import Group, Item, Table, collate, tabulate
from clairlib.training.frozen_prefix import Cut, deepest_cut, first_tensor, trace
from clairlib.training.grouped_lora import LoraStacks
from clairlib.training.schedule import NO_LABEL
from clairlib.training.suffix import Shortcuts, Suffix
from clairlib.training.targets import num_labels

LENGTHS = (12, 9, 11)  # tokens of the probe's examples
ITEMS = (Item(0, (0, 1), 1), Item(1, (2,), 1))
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative; where a cut is wrong the gradients differ by O(1)
HALF_TOLERANCE = 5e-2
RANK = 2


@dataclass(frozen=True)
class Plan:
    """The parts of the model that are left out, and what is then needed."""

    shortcuts: Shortcuts
    outputs: Mapping[str, Any]  # of modules, in the forward pass in which the cut was found
    widths: dict[Slot, tuple[int, torch.dtype]]  # of the cached values
    saved: float  # bytes per row that a step keeps for the backward pass, without logits


class Probe:
    """The probe's batch and adapters, and the whole model's losses and gradients for them."""

    def __init__(
        self, model: Any, targets: Sequence[str], *, shift: bool, classes: bool, pad: int, device: str,
        own_masks: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.targets, self.device = model, list(targets), device
        self.unmasked = shift and not own_masks  # whether to try without a mask
        self.kinds = num_labels(model, classes=classes)
        self.tolerance = TOLERANCE.get(next(model.parameters()).dtype, HALF_TOLERANCE)
        self.table = _random_table(model, self.kinds, shift=shift, classes=classes, pad=pad)
        self.group = self._collate(self.table, ITEMS)
        self.stacks, self.saved = _random_stacks(model, targets, device), 0.0
        self.seen = trace(model, {"input_ids": self.group.ids, "attention_mask": self.group.attended}, targets)
        for name in targets:
            self._check_target(name)
        self.expected = [torch.cat(pair) for pair in zip(*map(self._alone, ITEMS), strict=True)]

    def _check_target(self, name: str) -> None:
        if name not in self.seen.outputs:
            raise ValueError(f"target {name!r} takes no part in the model's forward pass; leave it out")
        module, found = self.model.get_submodule(name), self.seen.products[name]
        expected = linear(self.seen.inputs[name], module.weight, module.bias)
        if not _close(found, expected, self.tolerance):
            kind = type(module).__name__
            raise ValueError(f"target {name!r}, a {kind}, does not multiply by its weight; it cannot be adapted")

    def _alone(self, item: Item) -> list[Tensor]:
        """Return loss and gradients of one client by the whole model, example by example, so without padding."""
        parts = ([Item(item.position, (example,), item.labels)] for example in item.examples)
        results = [self._results(Shortcuts(), self._collate(self.table, part))[0] for part in parts]
        return [torch.stack(own).sum(dim=0) for own in zip(*results, strict=True)]

    def _collate(self, table: Table, items: Sequence[Item]) -> Group:
        return collate(table, items).to(self.device, torch.float64)

    def plan(self, autocast: torch.dtype | None) -> Plan:
        """Return as many shortcuts as are right: the deepest cut that caches no more than is needed."""
        most = Shortcuts(select=True, fused=True, unmasked=self.unmasked)
        deepest = deepest_cut(self.model, self.seen)
        lean = deepest and _lean(deepest)
        best = replace(most, cut=lean and replace(lean, single=self._may_be_single(lean)))
        if not self.holds(best):  # all shortcuts at once are right for most models
            best = self._careful(most, deepest)
        if best.cut is not None:
            best = self._pruned(best, best.cut)
        return Plan(best, self.seen.outputs, self._widths(best, autocast), self.saved)

    def _may_be_single(self, cut: Cut) -> bool:
        return self.table.classes is None and cut.index == len(self.model.get_submodule(cut.blocks)) - 1

    def _careful(self, most: Shortcuts, deepest: Cut | None) -> Shortcuts:
        """Try one shortcut after the other."""
        tries = [most, replace(most, unmasked=False), Shortcuts(select=True), Shortcuts(fused=True), Shortcuts()]
        plain = next(filter(self.holds, tries), None)
        if plain is None:
            raise ValueError(f"{type(self.model).__name__} treats examples of one batch together; it cannot be grouped")
        if deepest is None:
            return plain
        cuts = [_lean(deepest), deepest, Cut(deepest.blocks, deepest.index, deepest.module)]
        best = next((own for cut in cuts if self.holds(own := replace(plain, cut=cut))), plain)
        return self._better(best, single=True) if best.cut and self._may_be_single(best.cut) else best

    def _pruned(self, best: Shortcuts, cut: Cut) -> Shortcuts:
        """Return the shortcuts without the cached values that the result does not need."""
        cached, skipped = cut.cached, cut.skipped
        for name in cut.cached:
            rest = tuple(other for other in cached if other != name)
            less = self._better(best, cached=rest, skipped=(*skipped, name))
            if less is not best:
                best, cached, skipped = less, rest, (*skipped, name)
        return self._better(best, entry=False) if cached else best  # else only the entry bypasses the adapted module

    def _better(self, best: Shortcuts, **changes: Any) -> Shortcuts:
        """Return the shortcuts with a changed cut if that is right, else unchanged."""
        assert best.cut is not None
        changed = replace(best, cut=replace(best.cut, **changes))
        return changed if self.holds(changed) else best

    def holds(self, shortcuts: Shortcuts) -> bool:
        """Return whether losses and gradients agree with those of the whole model."""
        try:
            single = shortcuts.cut is not None and shortcuts.cut.single
            group = self._collate(self.table.only_labelled(), ITEMS) if single else self.group
            found, saved = self._results(shortcuts, group)
        except Exception:  # a model without some of its parts may fail in any way; the cut is then wrong
            return False
        right = all(_close(one, other, self.tolerance) for one, other in zip(found, self.expected, strict=True))
        self.saved = saved if right else self.saved  # the last right shortcuts are the ones taken
        return right

    def _results(self, shortcuts: Shortcuts, group: Group) -> tuple[list[Tensor], float]:
        """Return losses and gradients, each (G, ...), and the bytes per row kept for the backward pass.

        The bytes are without weights, cached values and logits.
        """
        values = {} if shortcuts.cut is None else self._values(shortcuts.cut, group)
        known = {own.untyped_storage().data_ptr() for own in (*self.model.parameters(), *values.values())}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and tensor.shape[-1:] != (self.kinds,):
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        suffix = Suffix(self.model, self.targets, shortcuts, outputs=self.seen.outputs)
        try:
            leaves = self.stacks.load(suffix.layers, group.positions)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                losses = suffix.losses(group, values)
            grads = torch.autograd.grad(losses.sum(), leaves)
        finally:
            suffix.remove()
        return [losses.detach(), *grads], sum(found.values()) / group.ids.numel()

    def _values(self, cut: Cut, group: Group) -> dict[Slot, Tensor]:
        """Return the values that the trace saw at the cut, row by row of the group."""
        _, places = np.unique(self.group.rows.cpu(), return_index=True)  # padding comes after the row that it repeats
        if cut.single:
            places = places[self.table.targets != NO_LABEL]
        values = {("in", name): self.seen.inputs[name] for name in cut.inputs()}
        values |= {("out", name): first_tensor(self.seen.outputs[name]) for name in cut.cached}
        at = torch.from_numpy(places).to(self.device)[group.rows.flatten()]
        return {slot: value.flatten(0, -2)[at].view(*group.rows.shape, -1) for slot, value in values.items()}

    def _widths(self, best: Shortcuts, autocast: torch.dtype | None) -> dict[Slot, tuple[int, torch.dtype]]:
        """Return width and dtype of every cached value of a cut."""
        if best.cut is None:
            return {}
        values = self._values(replace(best.cut, single=False), self.group)
        if autocast is not None:  # the trace ran without autocast
            with Recorder(self.model, best.cut, unmasked=best.unmasked, autocast=autocast) as record:
                values = record(self.group)
        return {slot: (value.shape[-1], value.dtype) for slot, value in values.items()}


def _lean(deepest: Cut) -> Cut:
    """Return the deepest cut with little cached."""
    if deepest.whole == deepest.module:  # its input may be the output cached before it
        return replace(deepest, whole=None)
    return replace(deepest, cached=(), skipped=deepest.cached)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(torch.linalg.vector_norm(found - expected) <= tolerance * torch.linalg.vector_norm(expected))


def _random_table(model: Any, kinds: int, *, shift: bool, classes: bool, pad: int) -> Table:
    """Draw examples of random tokens, half of them labelled."""
    draws = derive(0, "probe", "tokens")
    room = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS)
    vocabulary, examples = model.get_input_embeddings().num_embeddings, []
    for length in (min(length, room) for length in LENGTHS):
        tokens = torch.randint(vocabulary, (length,), generator=draws)
        tokens[tokens == pad] = (pad + 1) % vocabulary
        labels = torch.randint(kinds, () if classes else (length,), generator=draws)
        if not classes:
            labels[::2] = NO_LABEL
        examples.append({"input_ids": tokens, "labels": labels})
    return tabulate(examples, shift=shift, classes=classes, pad=pad)


def _random_stacks(model: Any, targets: Sequence[str], device: str) -> LoraStacks:
    updates: dict[str, list[LowRank]] = {}
    for name in targets:
        weight, draws = model.get_submodule(name).weight, derive(0, "probe", name)
        dtype = weight.dtype if weight.dtype in TOLERANCE else torch.float32
        p, q = weight.shape
        B = torch.randn(2, p, RANK, generator=draws, dtype=torch.float64)
        A = torch.randn(2, RANK, q, generator=draws, dtype=torch.float64) / q**0.5
        updates[name] = [LowRank(B[k].to(dtype), A[k].to(dtype), scale) for k, scale in enumerate((0.1, 0.05))]
    return LoraStacks(updates, learning_rate=0.0, weight_decay=0.0, device=device)
