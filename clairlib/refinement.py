"""Refinement: a benign client keeps its own part inside the subspace and takes the benign average outside."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from clairlib.frames import Frame, effective_dimensions, floor_energy, leave_one_out
from clairlib.subspace import gap_rank, project_out


@dataclass(frozen=True)
class Gain:
    """Estimated error of local and refined updates, mean squared Frobenius norm over the benign clients.

    ``local`` = noise outside and inside the subspace; ``off_subspace`` what remains of the outside noise after
    averaging, ``heterogeneity`` what averaging wipes out of benign differences, ``subspace_cost`` the signal lost
    because the subspace is itself estimated.
    """

    local: float
    inside: float
    off_subspace: float
    heterogeneity: float
    subspace_cost: float

    def scaled(self, factor: float) -> Gain:
        """The same gain for updates whose squared size is ``factor`` times as large."""
        return Gain(*(factor * value for value in astuple(self)))

    @property
    def relative(self) -> float:
        """1 - refined error / local error: the share of the local squared error that refinement removes."""
        refined = self.inside + self.off_subspace + self.heterogeneity + self.subspace_cost
        return 1.0 - refined / self.local if self.local > 0 else 0.0


def refined_core(X: Tensor, frame: Frame) -> Tensor:
    """P X_k + P_perp M for every client (K, p, q)."""
    return X - project_out(frame.basis, X - frame.mean)


def estimate_gain(X: Tensor, weights: Tensor, frame: Frame) -> Gain:
    """Estimated gain of refinement over local updates (our form of the abstract's oracle gain, its claim C4).

    With s members, off-subspace energy V per member, effective dimensions p_e, q_e and structured heterogeneity h^2:
    noise N = V - h^2, local error N (1 + r / p_e), refined error N r / p_e + N / s + h^2 (1 - 1/s) + r N / (q_e s), the
    last being the first-order cost of the estimated subspace.

    V comes from residuals left one out. h^2 is the part of it that stands above the noise in the client's own spectrum
    (gap of its residual's squared singular values); 0 for adapters of rank below 8. Not guaranteed: differences
    between benign clients that look like noise, spread over all directions, cannot be told from noise by any method
    that sees one update a client.
    """
    R = leave_one_out(X, weights, frame)[frame.members]
    s, r = frame.size, frame.rank
    energies = R.square().sum(dim=(1, 2))
    V = float(energies.mean())
    if s < 2 or floor_energy(X) >= V:
        return Gain(0.0, 0.0, 0.0, 0.0, 0.0)
    structured = torch.stack([_above_noise(r_k, x_k) for r_k, x_k in zip(R, X[frame.members], strict=True)])
    h2 = min(float(structured.mean()), V)
    noise = V - h2
    p_eff, q_eff = effective_dimensions(R)
    inside = noise * r / p_eff
    return Gain(noise + inside, inside, noise / s, h2 * (1 - 1 / s), r * noise / (q_eff * s))


def _above_noise(residual: Tensor, update: Tensor) -> Tensor:
    """Energy of a residual (p, q) in singular directions that stand apart from its own noise, above that noise.

    Only as many directions as the update has rank are looked at: an adapter of rank rho confines its noise to rho
    directions, and where those are few nothing can be told.
    """
    own = torch.linalg.svdvals(update)
    rank = int((own > own[0] * 1e-10).sum())
    values = torch.linalg.svdvals(residual).square()[:rank]
    g = gap_rank(values, rank // 2)
    return (values[:g] - values[g]).sum() if g else values.new_zeros(())
