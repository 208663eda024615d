"""Results of a module from its fit: subspace, common part, refined updates, and what groups of clients share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor

from clairlib.linalg.low_rank import LowRank
from clairlib.linalg.refined_factors import RefinedSubspace, SharedParts, refined_updates
from clairlib.recovery.convex import Certificate
from clairlib.recovery.inputs import Module, transpose
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.module_fit import ModuleFit, Outcome
from clairlib.recovery.result import ModuleResult

SMALLEST_REFINED_GROUP = 4  # clients below which a group other than the benign one is not refined within itself


@dataclass(frozen=True)
class Share:
    """What a group shares with the benign clients in a module.

    ``subspace`` is ||U' V||_F^2 / min(r, r') of the two bases, in [0, 1]; ``common_part`` the cosine of the common
    parts off their own subspaces.
    """

    subspace: float
    common_part: float


@dataclass(frozen=True)
class Maker:
    """Makes the results of one module; ``generator`` draws for randomised linear algebra."""

    module: Module
    refine_any: bool
    adapter_rank: int | None
    generator: Generator

    def result(
        self, fit: ModuleFit, outcome: Outcome, others: list[tuple[ModuleFit, Outcome]], certificate: Certificate | None
    ) -> tuple[ModuleResult, list[Share]]:
        """Return the result for the benign set, and what each of the ``others``, groups of clients, shares with it."""
        module, is_refined = self.module, outcome.is_refined(self.refine_any)
        parts = self._parts(fit, outcome)
        basis, off = lifted(parts)
        adapters, errors = self.refined(fit, outcome, parts) if is_refined else (module.updates, None)
        errors = torch.zeros_like(fit.weights) if errors is None else errors
        shares = []
        for other, its in others:
            own = self._parts(other, its)
            shares.append(share((basis, off), lifted(own)))
            if its.frame.size >= SMALLEST_REFINED_GROUP and its.is_refined(its.structure >= MIN_EXPLAINED_VARIANCE):
                made, lost = self.refined(other, its, own)
                adapters = merged(adapters, made, its.frame.members)
                errors = torch.where(its.frame.members, lost, errors)
        array = (lambda t: t.cpu().numpy()) if module.numpy else (lambda t: t)
        summary = outcome.summary(fit, module, self.refine_any, certificate)
        result = ModuleResult(
            **summary | {name: array(summary[name]) for name in ("scores", "p_values", "sizes")},
            basis=module.out(basis), common_part=module.out_update(off), refined=_as_given(module, adapters),
            truncation_errors=array(errors),
        )  # fmt: skip
        return result, shares

    def _parts(self, fit: ModuleFit, outcome: Outcome) -> SharedParts:
        return fit.parts(outcome.frame, cast(list[LowRank], self.module.updates))

    def refined(self, fit: ModuleFit, outcome: Outcome, parts: SharedParts) -> tuple[Any, Tensor]:
        """Return P Theta_k + a_k P_perp M of the members and the others' own updates, and truncation errors (K,)."""
        module, members = self.module, outcome.frame.members
        errors = torch.zeros_like(fit.weights)
        if isinstance(module.updates, Tensor):
            basis, off = cast(tuple[Tensor, LowRank], parts)
            X = module.updates.double()
            refined = basis @ (basis.T @ X) + fit.scales[:, None, None] * off.dense()
            return torch.where(members[:, None, None], refined, X), errors
        adapters, chosen = list(module.updates), members.nonzero()[:, 0].tolist()
        ranks = [self.adapter_rank or adapters[k].rank for k in chosen]
        made = refined_updates(parts, module.updates, chosen, ranks, self.generator, fit.scales)
        for k, (new, error) in zip(chosen, made, strict=True):
            B, A = new.B.to(adapters[k].B.dtype, copy=True), new.A.to(adapters[k].A.dtype, copy=True)
            if not bool(B.isfinite().all() and A.isfinite().all()):
                raise ValueError(f"refined updates of module {module.name!r} overflow {A.dtype}")
            adapters[k], errors[k] = LowRank(B, A), error
        return adapters, errors


def lifted(parts: SharedParts) -> tuple[Tensor, LowRank]:
    """Return basis U (p, r) and common part P_perp M."""
    return (parts.lifted_basis(), parts.common_part()) if isinstance(parts, RefinedSubspace) else parts


def share(first: tuple[Tensor, LowRank], second: tuple[Tensor, LowRank]) -> Share:
    """Return what two sets of clients share, given their bases and common parts."""
    (U, V), (C, D) = (first[0], second[0]), (_unit(first[1]), _unit(second[1]))
    small = max(min(U.shape[1], V.shape[1]), 1)
    sizes = [inner(part, part) for part in (C, D)]
    cosine = inner(C, D) / (sizes[0] * sizes[1]) ** 0.5 if min(sizes) > 0 else 0.0
    return Share(float((U.double().T @ V.double()).square().sum()) / small, cosine)


def inner(first: LowRank, second: LowRank) -> float:
    """Return the inner product of two updates in factored form."""
    left, right = first.B.double().T @ second.B.double(), first.A.double() @ second.A.double().T
    return first.scale * second.scale * float((left * right).sum())


def _unit(update: LowRank) -> LowRank:
    """Return the update divided by the largest entries of its factors, so that squares stay in range."""
    B, A = (factor / (float(factor.abs().max()) or 1.0) for factor in (update.B.double(), update.A.double()))
    return LowRank(B, A, 1.0 if update.scale >= 0 else -1.0)


def merged(adapters: Any, made: Any, members: Tensor) -> Any:
    """Return the updates, those of ``members`` (K,) bool replaced by ``made``."""
    if isinstance(adapters, Tensor):
        return torch.where(members[:, None, None], made, adapters)
    return [new if ok else old for old, new, ok in zip(adapters, made, members.tolist(), strict=True)]


def _as_given(module: Module, updates: Any) -> Any:
    """Return updates in the form of the input."""
    if isinstance(updates, Tensor):
        return module.out(updates.mT if module.transposed else updates)
    return [transpose(update) if module.transposed else update for update in updates]
