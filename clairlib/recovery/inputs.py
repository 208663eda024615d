"""Input checks: read client updates in every accepted form once, and give results back in the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.linalg.low_rank import LowRank

SINGLE = "update"  # name of the module if updates are not given by module
MAX_WEIGHT_RATIO = 1e9  # at larger ratios, a sum over clients in float64 no longer resolves the smallest weight


@dataclass(frozen=True)
class Module:
    """The clients' updates of one weight matrix, with the side whose subspace is sought as rows.

    ``transposed`` says that rows and columns were swapped, ``numpy`` that results are returned as numpy arrays.
    """

    name: str
    updates: Tensor | list[LowRank]
    transposed: bool
    numpy: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q), where p is the side whose subspace is sought."""
        first = self.updates[0]
        return (int(first.shape[0]), int(first.shape[1]))

    @property
    def reference(self) -> Tensor:
        """A tensor with the dtype and the device in which results are returned."""
        return self.updates if isinstance(self.updates, Tensor) else self.updates[0].B

    def subset(self, chosen: Tensor) -> Module:
        """Return the updates of the clients ``chosen`` (K,) bool alone."""
        if isinstance(self.updates, Tensor):
            return replace(self, updates=self.updates[chosen])
        return replace(self, updates=[update for update, ok in zip(self.updates, chosen.tolist(), strict=True) if ok])

    def have_updates(self) -> Tensor:
        """Return whether each client's update (K,) bool has an entry that is not zero."""
        if isinstance(self.updates, Tensor):
            return (self.updates != 0).flatten(1).any(dim=1)
        own = [bool(update.scale != 0 and (update.B != 0).any() and (update.A != 0).any()) for update in self.updates]
        return torch.tensor(own, device=self.reference.device)

    def out(self, tensor: Tensor) -> Any:
        """Return a result tensor in the dtype of the input, as a numpy array if the input was one."""
        tensor = tensor.to(self.reference.dtype)
        return tensor.cpu().numpy() if self.numpy else tensor

    def out_update(self, update: LowRank) -> Any:
        """Return a p x q result in the orientation of the input: factored if the input was factored, else dense."""
        update = transpose(update) if self.transposed else update
        if isinstance(self.updates, Tensor):
            return self.out(update.dense())
        return LowRank(self.out(update.B), self.out(update.A), update.scale)


@dataclass(frozen=True)
class Clients:
    """The clients' updates by module, with ``weights`` (K,), and ``expected`` squared errors by module if known."""

    names: list[str]
    modules: list[Module]
    weights: Tensor
    expected: dict[str, Tensor]
    by_module: bool

    def have_updates(self) -> Tensor:
        """Return whether each client (K,) bool has an update that is not zero, in any module."""
        return torch.stack([module.have_updates() for module in self.modules]).any(dim=0)

    def subset(self, chosen: Tensor) -> Clients:
        """Return the clients ``chosen`` (K,) bool; raise ValueError if they are too few."""
        names = [name for name, ok in zip(self.names, chosen.tolist(), strict=True) if ok]
        if len(names) < MINIMUM_CLIENTS:
            zero = next(name for name in self.names if name not in names)
            told = f"{len(self.names) - len(names)} updates are zero, the first that of client {zero!r}"
            raise ValueError(f"need at least {MINIMUM_CLIENTS} clients with an update; {told}")
        expected = {name: own[chosen] for name, own in self.expected.items()}
        modules = [module.subset(chosen) for module in self.modules]
        return replace(self, names=names, modules=modules, weights=self.weights[chosen], expected=expected)

    def marked(self, names: Sequence[str]) -> Tensor:
        """Return the clients of these names as (K,) bool; raise ValueError for a name that none has."""
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"trusted client {unknown[0]!r} is none of the clients with an update")
        return torch.tensor([name in names for name in self.names], device=self.weights.device)


def read_clients(updates: Any, names: list[str] | None, weights: Any, expected: Any, side: str) -> Clients:
    """Check updates, weights and expected squared errors; errors (TypeError, ValueError) name module and client."""
    modules, clients, by_module = read_modules(updates, names, side)
    w = read_weights(weights, clients).to(modules[0].reference.device)
    known = read_expected_errors(expected, [module.name for module in modules], clients)
    return Clients(clients, modules, w, known, by_module)


def transpose(update: LowRank) -> LowRank:
    """The transposed update, A' B'."""
    return LowRank(update.A.T, update.B.T, update.scale)


def read_modules(updates: Any, names: list[str] | None, side: str) -> tuple[list[Module], list[str], bool]:
    """Check updates and convert them to modules, in the order of the input.

    Also return client names and whether the input was a dict. Errors (TypeError, ValueError) name module and client.
    """
    by_module = isinstance(updates, Mapping)
    groups = updates if by_module else {SINGLE: updates}
    if not groups:
        raise ValueError("no modules given: updates is an empty dict")
    for module, group in groups.items():
        if not isinstance(module, str):
            raise TypeError(f"module names must be text; got {module!r}")
        if not isinstance(group, Sequence | Tensor | np.ndarray) or getattr(group, "ndim", 1) == 0:
            what = f"a (K, p, q) array or a sequence of LowRank; got {type(group).__name__}"
            raise TypeError(f"updates{where(module)} must be {what}")
    counts = {module: len(group) for module, group in groups.items()}
    first, K = next(iter(counts.items()))
    for module, count in counts.items():
        if count != K:
            raise ValueError(f"every module must have one update per client; {module!r} has {count}, {first!r} has {K}")
    if K < MINIMUM_CLIENTS:
        raise ValueError(f"need at least {MINIMUM_CLIENTS} clients to tell which of them differ; got {K}")
    clients = [f"client_{k}" for k in range(K)] if names is None else [str(name) for name in names]
    if len(clients) != K:
        raise ValueError(f"names must have one entry per client; got {len(clients)} names for {K} clients")
    if len(set(clients)) != K:
        twice = next(name for name in clients if clients.count(name) > 1)
        raise ValueError(f"client names must differ; {twice!r} is given twice")
    modules = [_read_module(name, group, clients, side == "input") for name, group in groups.items()]
    devices = {module.reference.device: module.name for module in modules}
    if len(devices) > 1:
        places = ", ".join(f"{module!r} on {device}" for device, module in devices.items())
        raise ValueError(f"all modules must be on one device; got {places}")
    return modules, clients, by_module


def where(module: str) -> str:
    """Return the words by which a message names the module; empty if there is only one module without a name."""
    return "" if module == SINGLE else f" in module {module!r}"


def _read_module(name: str, group: Any, clients: list[str], transposed: bool) -> Module:
    place = where(name)
    if isinstance(group, Sequence) and any(isinstance(update, LowRank) for update in group):
        return Module(name, _read_factors(group, clients, transposed, place), transposed, False)
    numpy = not isinstance(group, Tensor) and not all(isinstance(update, Tensor) for update in group)
    try:
        if numpy:
            stack = torch.as_tensor(np.asarray(group))
        else:
            stack = group if isinstance(group, Tensor) else torch.stack(list(group))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"updates{place} must be a (K, p, q) array or a sequence of LowRank: {error}") from None
    _check_tensor(stack, f"updates{place}")
    if stack.ndim != 3:
        raise ValueError(f"updates{place} must have shape (K, p, q); got {tuple(stack.shape)}")
    finite = stack.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"client {clients[int((~finite).nonzero()[0])]!r} has NaN or Inf{place}")
    stack = stack.detach()
    return Module(name, stack.mT if transposed else stack, transposed, numpy)


def _check_tensor(tensor: Any, what: str) -> None:
    """Check that ``tensor`` is a dense floating-point tensor with entries."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{what} must be a dense tensor with data; got {tensor.layout} on {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{what} must be floating point; got {tensor.dtype}")
    if 0 in tensor.shape:
        raise ValueError(f"{what} are empty: shape {tuple(tensor.shape)}")


def _read_factors(group: Sequence[Any], clients: list[str], transposed: bool, where: str) -> list[LowRank]:
    read: list[LowRank] = []
    for client, update in zip(clients, group, strict=True):
        if not isinstance(update, LowRank):
            raise TypeError(f"client {client!r} has {type(update).__name__}{where}, expected LowRank like the others")
        for factor in (update.B, update.A):
            _check_tensor(factor, f"the factors of client {client!r}{where}")
        if update.B.ndim != 2 or update.A.ndim != 2 or update.B.shape[1] != update.A.shape[0]:
            raise ValueError(f"client {client!r} has factors {tuple(update.B.shape)}, {tuple(update.A.shape)}{where}")
        if read and update.shape != read[0].shape:
            found = f"client {client!r} has {update.shape}{where}, expected {read[0].shape}"
            raise ValueError(f"updates must share (p, q); {found}")
        if not isinstance(update.scale, int | float):
            raise TypeError(f"client {client!r} has scale {update.scale!r}{where}, expected a number")
        if not (bool(update.B.isfinite().all() and update.A.isfinite().all()) and isfinite(update.scale)):
            raise ValueError(f"client {client!r} has NaN or Inf{where}")
        read.append(LowRank(update.B.detach(), update.A.detach(), float(update.scale)))
    return [transpose(update) for update in read] if transposed else read


def read_weights(weights: Any, clients: list[str]) -> Tensor:
    """Return positive weights (K,) with mean 1; all are 1 if None is given."""
    if weights is None:
        return torch.ones(len(clients), dtype=torch.float64)
    w = torch.as_tensor(weights, dtype=torch.float64).detach()
    if w.shape != (len(clients),):
        raise ValueError(f"weights must have shape ({len(clients)},), one a client; got {tuple(w.shape)}")
    bad = ~(w.isfinite() & (w > 0))
    if bool(bad.any()):
        raise ValueError(f"weights must be positive; client {clients[int(bad.nonzero()[0])]!r} has {w[bad][0].item()}")
    if float(w.max() / w.min()) > MAX_WEIGHT_RATIO:
        raise ValueError(f"weights must lie within a factor of {MAX_WEIGHT_RATIO:g} of one another")
    w = w / w.max()
    return w / w.mean()


def read_expected_errors(errors: Any, modules: list[str], clients: list[str]) -> dict[str, Tensor]:
    """Return the expected squared errors (K,) by module; empty if none are given."""
    if errors is None:
        return {}
    by_module = errors if isinstance(errors, Mapping) else {module: errors for module in modules}
    if unknown := set(by_module) - set(modules):
        raise ValueError(f"expected_sq_error has module {min(map(str, unknown))!r}, which has no updates")
    if not isinstance(errors, Mapping) and len(modules) > 1:
        raise ValueError("expected_sq_error of several modules must be a dict of module name -> array (K,)")
    read = {}
    for module, values in by_module.items():
        own = torch.as_tensor(values, dtype=torch.float64).detach()
        if own.shape != (len(clients),):
            shape = tuple(own.shape)
            raise ValueError(f"expected_sq_error{where(module)} must have shape ({len(clients)},); got {shape}")
        if not bool((own.isfinite() & (own >= 0)).all()):
            raise ValueError(f"expected_sq_error{where(module)} must be finite and not negative")
        read[module] = own
    return read
