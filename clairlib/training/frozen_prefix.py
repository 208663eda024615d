"""Candidates for a cut of the model: one forward pass is recorded up to the first adapted module.

This file does not decide whether a cut is right, and does not rely on the names of modules: `probe` compares the cut
model with the whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A cut of the model at the block of the first adapted module."""

    blocks: str  # name of the list of blocks
    index: int  # index of the block that is cut; earlier blocks are skipped
    module: str  # the first adapted module
    whole: str | None = None  # module of the same output; replaced by ``module``, applied to its cached input
    cached: tuple[str, ...] = ()  # modules of the block that finish before ``module``, with cached outputs
    skipped: tuple[str, ...] = ()  # modules of the block that finish before ``module``, with outputs not needed
    entry: bool = True  # whether the hidden states that enter the block are cached
    single: bool = False  # whether labelled positions go through alone: nothing after the cut looks at several

    @property
    def block(self) -> str:
        """Name of the block that is cut."""
        return f"{self.blocks}.{self.index}"

    def inputs(self) -> tuple[str, ...]:
        """Return the modules whose input is cached."""
        return (self.block,) * self.entry + ((self.module,) if self.whole else ())


@dataclass(frozen=True)
class Trace:
    """Record of one forward pass."""

    entered: list[str] = field(default_factory=list)  # modules in the order of entry
    inputs: dict[str, Any] = field(default_factory=dict)  # the first argument of each module
    outputs: dict[str, Any] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)  # copies of adapted modules' outputs, as these may change
    first: list[str] = field(default_factory=list)  # the first adapted module
    done: set[str] = field(default_factory=set)  # modules that had returned when it was entered


def trace(model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[str]) -> Trace:
    """Record one forward pass."""
    seen, hooks = Trace(), []

    def enter(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs[name] = first_input(args, kwargs)
        if name in targets and not seen.first:
            seen.first.append(name)
            seen.done.update(seen.outputs)
        seen.entered.append(name)

    def leave(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.outputs[name] = output
        if name in targets:
            seen.products[name] = output.clone()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def deepest_cut(model: nn.Module, seen: Trace) -> Cut | None:
    """Return the cut right before the first adapted module, with everything cached; None if no block holds it."""
    first = seen.first[0]
    blocks = next((name for name in _ancestors(first) if isinstance(model.get_submodule(name), nn.ModuleList)), None)
    if blocks is None:
        return None
    index = int(first[len(blocks) + 1 :].split(".")[0])
    block = f"{blocks}.{index}"
    passed = {f"{blocks}.{j}" for j in range(index)}
    if any(seen.entered.count(name) != 1 for name in (*passed, block, first)) or not passed <= seen.done:
        return None
    path = [name for name in (*_ancestors(first), first) if name.startswith(block)]  # the block, ..., the module
    out = seen.outputs[first]
    whole = next(name for name in path[1:] if first_tensor(seen.outputs[name]) is out)
    inside = path[: path.index(whole)]
    children = [f"{name}.{child}" for name in inside for child, _ in model.get_submodule(name).named_children()]
    rows = out.numel() // out.shape[-1]
    cached = [name for name in children if name in seen.done and _has_rows(seen.outputs[name], rows)]
    return Cut(blocks, index, first, whole, tuple(cached))


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def first_tensor(output: Any) -> Any:
    """Return a module's output, or the first element of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def _has_rows(output: Any, rows: int) -> bool:
    """Return whether the output has one row per token."""
    tensor = first_tensor(output)
    return isinstance(tensor, Tensor) and tensor.dim() in (2, 3) and tensor.numel() == rows * tensor.shape[-1]


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden states that a module gets: its first argument, or ``hidden_states``."""
    return args[0] if args else kwargs.get("hidden_states")
