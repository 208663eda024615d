"""Evaluation of a language model under many updates; the layers below the adapted modules run only once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clairlib.training import ClientData, Schedule
from clairlib.training.activations import Activations, Recorder, fill
from clairlib.training.batches import Group, Item, collate, split
from clairlib.training.preparation import CACHE_BYTES, GROUP_TOKENS, prepare
from clairlib.training.schedule import NO_LABEL
from clairlib.training.suffix import Suffix


class Evaluator:
    """Evaluates a model at the labelled positions of some examples, under updates of some modules.

    Parameters
    ----------
    model : a `transformers` model for causal language modelling or token classification
    examples : in the format of `ClientData`, with N labelled positions in total
    targets : names of the updated modules, or the ends of these names
    outputs : Tensor (V,), optional
        Logits to choose from; None for all.

    Attributes
    ----------
    truth : Tensor (N,)
        The examples' own labels, as indices of logits.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Mapping[str, Tensor]],
        targets: Sequence[str],
        outputs: Tensor | None = None,
        *,
        device: str = "cpu",
        group_tokens: int = GROUP_TOKENS,
    ) -> None:
        how: dict[str, Any] = {"device": device, "autocast": None, "group_tokens": group_tokens}
        job = [ClientData("judged", examples)]
        self.plan = prepare(model, job, list(targets), Schedule(steps=1), cache_bytes=CACHE_BYTES, **how)
        self.outputs, shortcuts, table = outputs, self.plan.plan.shortcuts, self.plan.rows
        self.truth = torch.from_numpy(table.targets[table.targets != NO_LABEL])
        self.activations = None
        if shortcuts.cut is not None:
            self.activations = Activations(self.plan.plan.widths, len(table.ids), device=device, limit=CACHE_BYTES)
            with Recorder(self.plan.twin, shortcuts.cut, unmasked=shortcuts.unmasked, autocast=None) as record:
                fill(self.activations, record, self.plan.table, group_tokens)
        self.suffix = Suffix(self.plan.twin, self.plan.targets, shortcuts, outputs=self.plan.plan.outputs)

    def answers(self, updates: Mapping[str, Tensor]) -> Tensor:
        """Return the index among ``outputs`` of the largest logit, (M, N), under M updates, by module (M, p, q)."""

        def best(logits: Tensor, _: Tensor) -> Tensor:
            return (logits if self.outputs is None else logits[:, self.outputs.to(logits.device)]).argmax(dim=1)

        return self._measured(updates, best, torch.zeros((), dtype=torch.long))

    def predictions(self, updates: Mapping[str, Tensor]) -> Tensor:
        """Return each label's loss among all logits, and whether its logit is largest: (M, N, 2) under M updates."""

        def measure(logits: Tensor, targets: Tensor) -> Tensor:
            losses = cross_entropy(logits.float(), targets, reduction="none")
            return torch.stack([losses, (logits.argmax(dim=1) == targets).to(losses)], dim=1)

        return self._measured(updates, measure, torch.zeros(2))

    @torch.no_grad()
    def _measured(
        self, updates: Mapping[str, Tensor], measure: Callable[[Tensor, Tensor], Tensor], blank: Tensor
    ) -> Tensor:
        """Apply ``measure`` to logits and labels at every labelled position under M updates; return (M, N, ...).

        ``blank`` is a zero tensor with the shape and dtype of one measurement.
        """
        table, count = self.plan.rows, len(next(iter(updates.values())))
        whole = tuple(range(len(table.starts)))
        found = blank.repeat(count, len(table.ids), *[1] * blank.dim())
        groups = split(table, [Item(m, whole, 1) for m in range(count)], self.plan.group_tokens)
        for group in (collate(table, items).to(self.plan.device, torch.float32) for items in groups):
            own = measure(self._logits(group, updates), group.targets.flatten()).cpu()
            rows = group.rows.flatten() if group.select is None else group.rows.flatten()[group.select]
            shape = (len(group.positions), -1)
            found[torch.tensor(group.positions)[:, None], rows.view(shape).cpu()] = own.view(*shape, *blank.shape)
        return found[:, torch.from_numpy(table.targets != NO_LABEL)]

    def _logits(self, group: Group, updates: Mapping[str, Tensor]) -> Tensor:
        """Return logits (G * s, V) at the labels of a group."""
        suffix, at = self.suffix, list(group.positions)
        for name, layer in suffix.layers.items():
            layer.load([updates[name][at].to(layer.weight)], torch.ones(len(at), device=layer.weight.device))
        suffix.group, suffix.values = group, {} if self.activations is None else self.activations.gather(group)
        mask = None if suffix.unmasked else group.attended
        logits = suffix.model(input_ids=group.ids, attention_mask=mask).logits.flatten(0, -2)
        return logits if group.select is None or suffix.selects else logits[group.select]
