"""Values that the frozen part of the model hands on, computed once per example and kept in memory or on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clairlib.training.batches import Group, Item, Table, collate, split
from clairlib.training.frozen_prefix import Cut, first_input, first_tensor
from clairlib.training.schedule import NO_LABEL
from clairlib.training.suffix import maybe_autocast

Slot = tuple[str, str]  # "in" or "out", name of a module


class _Enough(Exception):
    """Ends a forward pass once all requested values were seen."""


class Recorder:
    """Runs the frozen model up to the cut, for the values that go in and come out there; as a context manager."""

    def __init__(self, model: Any, cut: Cut, *, unmasked: bool, autocast: torch.dtype | None) -> None:
        self.model, self.cut, self.unmasked, self.autocast = model, cut, unmasked, autocast
        self.device = str(model.get_input_embeddings().weight.device)
        self.seen: dict[Slot, Tensor] = {}
        self.hooks = []
        for name in cut.inputs():
            enter = partial(self._enter, name)
            self.hooks.append(model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True))
        for name in cut.cached:
            self.hooks.append(model.get_submodule(name).register_forward_hook(partial(self._leave, name)))
        self.hooks.append(model.get_submodule(cut.module).register_forward_pre_hook(self._stop))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def __call__(self, group: Group) -> dict[Slot, Tensor]:
        """Run a group and return slot -> values (rows, T, width)."""
        self.seen = {}
        try:
            with maybe_autocast(torch.device(self.device).type, self.autocast):
                self.model(input_ids=group.ids, attention_mask=None if self.unmasked else group.attended)
        except _Enough:
            pass
        return {slot: value.view(*group.ids.shape, -1) for slot, value in self.seen.items()}

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen["in", name] = first_input(args, kwargs)

    def _leave(self, name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.seen["out", name] = first_tensor(output)

    def _stop(self, *_: object) -> None:
        raise _Enough


class Activations:
    """The recorded values of every row of a table, in the device's memory.

    Values of more than ``limit`` bytes lie in memory-mapped files, which `close` removes.

    Raises
    ------
    OSError
        They fit neither into ``limit`` nor on the disk of the folder for temporary files.
    """

    def __init__(self, widths: Mapping[Slot, tuple[int, torch.dtype]], rows: int, *, device: str, limit: int) -> None:
        self.device, self.folder = device, None
        needed = size_of(widths, rows)
        if needed > limit:
            self.folder = tempfile.TemporaryDirectory(prefix="clair-activations-")
            free = shutil.disk_usage(self.folder.name).free
            if needed > free:
                self.close()
                where = f"{tempfile.gettempdir()!r} has {free:.2e} free (TMPDIR chooses the folder)"
                raise OSError(f"the frozen part's activations need {needed:.2e} bytes, {where}")
        self.buffers = {slot: self._buffer(index, rows, *widths[slot]) for index, slot in enumerate(widths)}

    def _buffer(self, index: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.empty(rows, width, dtype=dtype, device=self.device)
        path = str(Path(self.folder.name) / f"{index}")
        return torch.from_file(path, shared=True, size=rows * width, dtype=dtype).view(rows, width)

    def gather(self, group: Group) -> dict[Slot, Tensor]:
        """Return slot -> values (rows, T, width) of a group, on the device."""
        rows, shape = group.rows.flatten(), group.rows.shape
        rows = rows if self.folder is None else rows.cpu()
        return {slot: own.index_select(0, rows).view(*shape, -1).to(self.device) for slot, own in self.buffers.items()}

    def close(self) -> None:
        """Remove the files, if there are any."""
        if self.folder is not None:
            self.folder.cleanup()


def size_of(widths: Mapping[Slot, tuple[int, torch.dtype]], rows: int) -> int:
    """Return the number of bytes of ``rows`` rows."""
    return sum(rows * width * dtype.itemsize for width, dtype in widths.values())


def fill(activations: Activations, record: Recorder, table: Table, limit: int) -> None:
    """Run the frozen part once over every example of a table of sequences, in groups of at most ``limit`` tokens."""
    places = np.arange(len(table.ids))
    if record.cut.single:
        places = np.cumsum(table.targets != NO_LABEL) - 1  # only labelled rows are stored
    order = np.argsort(table.lengths, kind="stable").tolist()
    for items in split(table, [Item(0, tuple(order), 1)], limit):
        examples = np.array(items[0].examples)
        group = collate(table, items).to(record.device, torch.float32)
        keep = np.arange(group.ids.shape[1]) < table.lengths[examples][:, None]
        rows = group.rows.cpu().numpy()
        if record.cut.single:
            keep &= table.targets[rows] != NO_LABEL
        flat, to = torch.from_numpy(np.flatnonzero(keep)), torch.from_numpy(places[rows[keep]])
        for slot, values in record(group).items():
            buffer = activations.buffers[slot]
            chosen = values.flatten(0, 1)[flat.to(values.device)]
            buffer.index_copy_(0, to.to(buffer.device), chosen.to(buffer))
