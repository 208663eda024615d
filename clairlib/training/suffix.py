"""The model without its frozen part below the first adapted module, and with grouped adapters.

The model's own forward pass runs as it is, so masks and positions stay the model's. Modules whose outputs do not depend
on the adapters are replaced by stubs that return values computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clairlib.training.batches import Group
from clairlib.training.frozen_prefix import Cut, first_input, first_tensor
from clairlib.training.fused import is_root_mean_square_norm, root_mean_square_norm, weighted_cross_entropy
from clairlib.training.grouped_lora import GroupedLinear


def maybe_autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context that autocasts to a dtype, or does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


def shared_copy(model: nn.Module, device: str) -> nn.Module:
    """Copy the modules around the same weights, frozen and in eval mode (no dropout); the model is untouched."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to(device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(device)
    twin = copy.deepcopy(model, memo).eval()
    if hasattr(twin.config, "use_cache"):
        twin.config.use_cache = False
    return twin


class _Stub(nn.Module):
    """Replacement of a module that returns ``answer`` in the form of its output and has its other attributes."""

    def __init__(self, module: nn.Module, answer: Callable[..., Tensor], output: Any = None) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a submodule: it never runs
        self.answer = answer
        self.rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        self.flat = isinstance(first_tensor(output), Tensor) and first_tensor(output).dim() == 2  # (rows * T, width)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.answer(*args, **kwargs)
        out = out.flatten(0, -2) if self.flat else out
        return out if self.rest is None else (out, *self.rest)


@dataclass(frozen=True)
class Shortcuts:
    """Parts of the whole model that are left out or computed differently."""

    cut: Cut | None = None  # None: the whole model runs at every step
    select: bool = False  # whether logits are computed at labelled positions alone
    fused: bool = False  # whether root-mean-square norms take fewer passes over memory
    unmasked: bool = False  # whether there is no attention mask; no token sees the padding on its right


class Suffix:
    """The model with grouped adapters and shortcuts installed, until `remove`."""

    def __init__(
        self, model: Any, targets: Sequence[str], shortcuts: Shortcuts, *, outputs: Mapping[str, Any],
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.model, self.cut, self.autocast, self.unmasked = model, shortcuts.cut, autocast, shortcuts.unmasked
        self.device_type = model.get_input_embeddings().weight.device.type
        self.values: Mapping[tuple[str, str], Tensor] = {}  # ("in" or "out", module) -> cached (rows, T, width)
        self.group: Group | None = None
        self.undo: list[Callable[[], Any]] = []
        self.layers: dict[str, GroupedLinear] = {}  # the adapted modules by name
        norms = [name for name, own in model.named_modules() if shortcuts.fused and is_root_mean_square_norm(own)]
        for name in targets:
            self.layers[name] = GroupedLinear(model.get_submodule(name), name, autocast)
            self._put(name, self.layers[name])
        head = model.get_output_embeddings()
        self.selects = shortcuts.select and head is not None and not isinstance(head, GroupedLinear)
        if self.selects:
            self._replace(_name(model, head), partial(self._selected, head))
        for name in norms:
            self._replace(name, partial(root_mean_square_norm, module=model.get_submodule(name)))
        if shortcuts.cut is not None:
            self._install(shortcuts.cut, outputs)

    def remove(self) -> None:
        """Restore the model as it was."""
        while self.undo:
            self.undo.pop()()

    def losses(self, group: Group, values: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """Return each client's part of its mean loss (G,), with the updates that the layers hold."""
        self.group, self.values = group, values
        with maybe_autocast(self.device_type, self.autocast):
            mask = None if self.unmasked else group.attended
            logits = self.model(input_ids=group.ids, attention_mask=mask).logits.flatten(0, -2)
        if group.select is not None and not self.selects:
            logits = logits[group.select]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        each = weighted_cross_entropy(logits, group.targets.flatten(), group.weights.flatten().to(logits))
        return each.view_as(group.targets).sum(dim=1)

    def _selected(self, head: Any, hidden: Tensor) -> Tensor:
        assert self.group is not None
        if self.group.select is None:
            return head(hidden)
        return head(hidden.flatten(0, -2)[self.group.select])[None]  # (1, G * s, V)

    def _install(self, cut: Cut, outputs: Mapping[str, Any]) -> None:
        embedding = self.model.get_input_embeddings()
        nothing = embedding.weight.new_zeros(()).expand(embedding.embedding_dim)
        self._replace(_name(self.model, embedding), lambda ids: nothing.expand(*ids.shape, -1))
        for name in (*(f"{cut.blocks}.{j}" for j in range(cut.index)), *cut.skipped):
            self._replace(name, lambda *args, **kwargs: first_input(args, kwargs), outputs[name])
        for name in cut.cached:
            self._replace(name, lambda *_, name=name, **__: self.values["out", name], outputs[name])
        if cut.entry:
            block = self.model.get_submodule(cut.block)
            self.undo.append(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        if cut.whole is not None:
            layer = self.layers[cut.module]
            self._replace(cut.whole, lambda *_, **__: layer(self.values["in", cut.module]), outputs[cut.whole])

    def _replace(self, name: str, answer: Callable[..., Tensor], output: Any = None) -> None:
        self._put(name, _Stub(self.model.get_submodule(name), answer, output))

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        holder = self.model.get_submodule(parent)
        self.undo.append(partial(setattr, holder, child, getattr(holder, child)))
        setattr(holder, child, module)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self.cut is not None
        hidden = self.values["in", self.cut.block]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, own in model.named_modules() if own is module)
