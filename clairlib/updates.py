"""The public door: client updates in any accepted form, checked once, and results given back in the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clairlib.factors import Cores, LowRank, cores_of_dense, cores_of_factors

SINGLE = "update"  # name of the module when updates are not given by module
MINIMUM_CLIENTS = 3


@dataclass(frozen=True)
class Module:
    """The clients' updates of one weight matrix, output or input side first as asked for.

    ``updates`` is a stack (K, p, q) or a list of LowRank; ``transposed`` says that rows and columns were swapped.
    """

    name: str
    updates: Tensor | list[LowRank]
    transposed: bool
    numpy: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q), p the side whose subspace is sought."""
        first = self.updates[0]
        return (int(first.shape[0]), int(first.shape[1]))

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and device in which results are given back."""
        return self.updates if isinstance(self.updates, Tensor) else self.updates[0].B

    def cores(self) -> Cores:
        """The updates in orthonormal coordinates, float64."""
        return cores_of_dense(self.updates) if isinstance(self.updates, Tensor) else cores_of_factors(self.updates)

    def out(self, tensor: Tensor) -> Any:
        """A result tensor in the input's dtype, numpy where the input was."""
        tensor = tensor.to(self.reference.dtype)
        return tensor.cpu().numpy() if self.numpy else tensor

    def out_update(self, update: LowRank) -> Any:
        """A p x q result: factored where the input was, dense where it was dense; in the input's orientation."""
        if self.transposed:
            update = transpose(update)
        if isinstance(self.updates, Tensor):
            return self.out(update.dense())
        return LowRank(self.out(update.B), self.out(update.A), update.scale)


def transpose(update: LowRank) -> LowRank:
    """The transposed update, A' B'."""
    return LowRank(update.A.T, update.B.T, update.scale)


def read_modules(updates: Any, names: list[str] | None, side: str) -> tuple[list[Module], list[str], bool]:
    """Check updates and bring them into modules.

    Returns
    -------
    list of Module, client names, and whether the input was a dict of modules.

    Raises
    ------
    TypeError, ValueError
        One line that names the module and the client.
    """
    by_module = isinstance(updates, Mapping)
    groups = updates if by_module else {SINGLE: updates}
    if not groups:
        raise ValueError("no modules given: updates is an empty dict")
    counts = {module: len(group) for module, group in groups.items()}
    K = next(iter(counts.values()))
    for module, count in counts.items():
        if count != K:
            first = next(iter(counts))
            raise ValueError(f"modules must have one update a client; {module!r} has {count}, {first!r} has {K}")
    if K < MINIMUM_CLIENTS:
        raise ValueError(f"need at least {MINIMUM_CLIENTS} clients to tell who agrees with whom; got {K}")
    clients = [f"client_{k}" for k in range(K)] if names is None else [str(name) for name in names]
    if len(clients) != K:
        raise ValueError(f"names must have one entry a client; got {len(clients)} names for {K} clients")
    if len(set(clients)) != K:
        twice = next(name for name in clients if clients.count(name) > 1)
        raise ValueError(f"client names must differ; {twice!r} is given twice")
    modules = [_read_module(str(name), group, clients, side == "input") for name, group in groups.items()]
    return modules, clients, by_module


def _read_module(name: str, group: Any, clients: list[str], transposed: bool) -> Module:
    where = "" if name == SINGLE else f" in module {name!r}"
    if isinstance(group, Sequence) and any(isinstance(update, LowRank) for update in group):
        return _read_factors(name, group, clients, transposed, where)
    numpy = not isinstance(group, Tensor)
    try:
        stack = torch.as_tensor(np.asarray(group)) if numpy else group
    except (TypeError, ValueError) as error:
        raise ValueError(f"updates{where} must be a (K, p, q) array or a sequence of LowRank: {error}") from None
    if stack.ndim != 3:
        raise ValueError(f"updates{where} must have shape (K, p, q); got {tuple(stack.shape)}")
    if not stack.is_floating_point():
        raise TypeError(f"updates{where} must be floating point; got {stack.dtype}")
    if 0 in stack.shape:
        raise ValueError(f"updates{where} are empty: shape {tuple(stack.shape)}")
    finite = stack.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"client {clients[int((~finite).nonzero()[0])]!r} has NaN or Inf{where}")
    return Module(name, stack.mT if transposed else stack, transposed, numpy)


def _read_factors(name: str, group: Sequence[Any], clients: list[str], transposed: bool, where: str) -> Module:
    expected = next(update.shape for update in group if isinstance(update, LowRank))
    for client, update in zip(clients, group, strict=True):
        if not isinstance(update, LowRank):
            raise TypeError(f"client {client!r} has {type(update).__name__}{where}, expected LowRank like the others")
        if update.B.ndim != 2 or update.A.ndim != 2 or update.B.shape[1] != update.A.shape[0]:
            raise ValueError(f"client {client!r} has factors {tuple(update.B.shape)}, {tuple(update.A.shape)}{where}")
        if update.shape != expected:
            raise ValueError(
                f"updates must share (p, q); client {client!r} has {update.shape}{where}, expected {expected}"
            )
        factors_finite = bool(update.B.isfinite().all() and update.A.isfinite().all())
        if not (factors_finite and np.isfinite(update.scale)):
            raise ValueError(f"client {client!r} has NaN or Inf{where}")
    return Module(name, [transpose(u) for u in group] if transposed else list(group), transposed, False)
