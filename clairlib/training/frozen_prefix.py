"""Where a model can be cut: one forward pass is watched, and what was done before the first adapted module noted.

Whether a cut is right is not decided here, nor by the names of modules: `probe` compares it with the whole model.
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
    """Where the model is cut: at the block of the first adapted module.

    Attributes
    ----------
    blocks, index : str, int
        The list of blocks, and the one that holds the first adapted module; those before it are passed by.
    module : str
        The first adapted module.
    whole : str or None
        Module whose output is that of ``module``, which then stands in its place on its cached input.
    cached : tuple of str
        Modules of the block that are done before ``module``, whose outputs are cached.
    skipped : tuple of str
        Such modules whose outputs nothing needs.
    entry : bool
        Are the hidden states that enter the block cached?
    single : bool
        Nothing after the cut looks at more than one position: labelled ones go through alone.
    """

    blocks: str
    index: int
    module: str
    whole: str | None = None
    cached: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    entry: bool = True
    single: bool = False

    @property
    def block(self) -> str:
        """Name of the block that is cut."""
        return f"{self.blocks}.{self.index}"

    def inputs(self) -> tuple[str, ...]:
        """Modules whose input is cached."""
        return (self.block,) * self.entry + ((self.module,) if self.whole else ())


@dataclass(frozen=True)
class Trace:
    """One forward pass of the model: modules in the order they are entered, what each first got and returned.

    ``done`` are those that had returned when ``first``, the first adapted module, was entered; ``products`` are copies
    of what the adapted modules returned, which others may change in place.
    """

    entered: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)


def trace(model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[str]) -> Trace:
    """Watch one forward pass."""
    seen, hooks = Trace(), []

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs[name] = first_input(args, kwargs)
        if name in targets and not seen.first:
            seen.first.append(name)
            seen.done.update(seen.outputs)
        seen.entered.append(name)

    def leave(name: str, output: Any) -> None:
        seen.outputs[name] = output
        if name in targets:
            seen.products[name] = output.clone()

    for name, module in model.named_modules():
        watch = partial(lambda name, _, args, kwargs: enter(name, args, kwargs), name)
        hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(lambda name, _, __, out: leave(name, out), name)))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def deepest_cut(model: nn.Module, seen: Trace) -> Cut | None:
    """The cut right before the first adapted module, everything cached; None where no list of blocks holds it."""
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
    """What a module hands on: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


def _has_rows(output: Any, rows: int) -> bool:
    """Is it one row a token?"""
    tensor = first_tensor(output)
    return isinstance(tensor, Tensor) and tensor.dim() in (2, 3) and tensor.numel() == rows * tensor.shape[-1]


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a module gets: its first argument, or the one of that name."""
    return args[0] if args else kwargs.get("hidden_states")
