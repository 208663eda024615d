"""Every client against the frame fitted without it: residuals, leverage, and explained variance.

Clients come as a float64 stack X (K, p, q) with weights w (K,), as in `clairlib.recovery.frame`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clairlib.linalg.downdating import downdated_bases
from clairlib.linalg.rank import gap_rank, resolved_rank
from clairlib.linalg.subspace import project_out, squared_singular_values
from clairlib.recovery.effective_dimensions import EffectiveDimensions
from clairlib.recovery.frame import Frame, centred, floor_energy, member_loads

NO_EXPLAINED_VARIANCE = 1e-3  # smallest explained variance that is returned for clients that differ
MIN_EXPLAINED_VARIANCE = 0.1  # unrelated clients and very noisy clients stay below; above, the subspace predicts
LEAST_LOAD = 1e-3  # a direction that only one member loads counts as this part of the last kept direction


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Clients X (K, p, q) with weights (K,) against a frame: a member against the frame refitted without it.

    A non-member is compared with the frame itself. In-sample residuals would make every non-member look foreign.
    """

    X: Tensor
    weights: Tensor
    frame: Frame

    @cached_property
    def bases(self) -> Tensor:
        """Bases (n, p, r) of the subspaces fitted without each of the n members."""
        loads = member_loads(self.X, self.weights, self.frame)
        return self.frame.eigenvectors @ downdated_bases(self.frame.eigenvalues.clamp(min=0.0), loads, self.frame.rank)

    @cached_property
    def R(self) -> Tensor:
        """Residuals off the subspace (K, p, q), all on one scale.

        R_k = P_perp (X_k - M) / sqrt(1 / w_k + 1 / W), where W is the total weight behind M. Under benign noise of
        variance sigma^2 / w_k every entry then has variance sigma^2, apart from the error of P.
        """
        inside, w = self.frame.members, self.weights
        W, D, R = w[inside].sum(), centred(self.X, w, self.frame), torch.empty_like(self.X)
        R[~inside] = project_out(self.frame.basis, D[~inside])
        R[inside] = project_out(self.bases, D[inside]) * (W / (W - w[inside]))[:, None, None]  # X_k - M_(-k)
        return R / self.scale[:, None, None]

    @cached_property
    def scale(self) -> Tensor:
        """Standard deviation (K,) of the noise of X_k - M, where M leaves k out, over that of a client of weight 1."""
        w, W = self.weights, self.weights[self.frame.members].sum()
        return (1 / w + 1 / torch.where(self.frame.members, W - w, W)).sqrt()

    @cached_property
    def squares(self) -> Tensor:
        """Squared singular values (K, min(p, q)) of the residuals, descending."""
        return squared_singular_values(self.R)

    @cached_property
    def benign(self) -> EffectiveDimensions:
        """Distribution of the members' residuals over rows and columns."""
        return EffectiveDimensions(self.R[self.frame.members], self.frame.shared_block)

    @cached_property
    def floor(self) -> float:
        """Energy below which a residual counts as exactly zero."""
        return floor_energy(self.X)

    @cached_property
    def inside(self) -> Tensor:
        """Log energy (K,) of every update inside the subspace."""
        energy, members = torch.empty_like(self.X[:, 0, 0]), self.frame.members
        energy[~members] = (self.frame.basis.T @ self.X[~members]).square().sum(dim=(1, 2))
        energy[members] = (self.bases.mT @ self.X[members]).square().sum(dim=(1, 2))
        return energy.clamp(min=self.floor).log()

    @cached_property
    def leverage(self) -> Tensor:
        """Energy (K,) that the subspace's tilt adds to a residual, in units of the noise energy of a column.

        A subspace fitted to noisy clients is tilted, and leaves out more of a client that holds more in it: for a
        client with coefficients C_k (r, q) by tr(C_k' S^-1 C_k), to be divided by the columns of the noise, where S is the scatter without the client (the
        leverage of least squares; residuals so corrected are studentised). Directions of the noise have no tilt: only
        those before a gap of the spectrum count.
        """
        frame, w, K, r = self.frame, self.weights, len(self.X), self.frame.rank
        apart = max(gap_rank(frame.eigenvalues[: resolved_rank(frame.eigenvalues)], r), 1)
        if r == 0:
            return self.X.new_zeros(K)
        members, W = frame.members, w[frame.members].sum()
        C = frame.basis.T[:apart] @ centred(self.X, w, frame)
        G = C @ C.mT
        loss = torch.where(members, w * W / (W - w), 0.0)
        values, Q = torch.linalg.eigh(torch.diag(frame.eigenvalues[:apart]) - loss[:, None, None] * G)
        least = LEAST_LOAD * frame.eigenvalues[apart - 1] + torch.finfo(G.dtype).tiny
        inverse = (Q / values.clamp(min=least)[:, None, :]) @ Q.mT
        own = torch.where(members, (W / (W - w)).square() / (1 / w + 1 / (W - w)), 1 / (1 / w + 1 / W))
        return (inverse * G).sum(dim=(1, 2)) * own

    @cached_property
    def explained_variance(self) -> Tensor:
        """Explained variance of the members beyond chance, in [0, 1], by leave-one-out prediction.

        1 - (leave-one-out energy of P_perp D) / (leave-one-out energy of D) - r / (p_eff + r). The last term is the
        part that any r directions explain of pure noise. It is 0 if the members do not differ, otherwise at least
        ``NO_EXPLAINED_VARIANCE``, so that modules without structure count if there are no others.
        """
        frame = self.frame
        w, W = self.weights[frame.members], self.weights[frame.members].sum()
        D = centred(self.X, self.weights, frame)[frame.members].square().sum(dim=(1, 2))
        total = (D * w * W / (W - w)).sum()
        if total <= self.floor * frame.size:
            return total.new_zeros(())
        p_eff, _ = self.benign.effective_dimensions()
        unexplained = self.benign.R.square().sum() / total
        return (1 - unexplained - frame.rank / (p_eff + frame.rank)).clamp(min=NO_EXPLAINED_VARIANCE)
