"""Unequal clients: the size a_k of every client, from the common part, and heavy rows of its noise.

Theta_k = a_k (M + U A_k + H_k) + sigma_k E_k. A frame is fitted to Theta_k / a_k, so that clients of another size are
not taken for contaminated; a client's refined update is multiplied back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import Frame, fit_frame, floor_energy
from clairlib.recovery.leave_one_out import LeaveOneOut

MOST_SCALE = 5.0  # largest size of a client over that of the median member, and its inverse
MOST_SCALE_ERROR = 0.05  # largest standard error of the median client's size; above, all clients count as alike
LEAST_AGREEMENT = 0.5  # least part of the squared correlations off the subspace that one common part explains
FIT_ROUNDS = 50
HEAVY_ERROR = 0.01  # chance that Gaussian noise of a client shows a heavy row, or a heavy entry
CUT_ERROR = 0.18  # part of Gaussian noise beyond Huber's 1.345 standard deviations


@dataclass(frozen=True)
class CommonParts:
    """How much of the members' common part every client holds: ``raw`` (K,), 1 for the median member.

    ``error`` (K,) is the variance of raw by noise, ``between`` that between members beyond noise, 0 if
    it is no larger than that by noise.
    """

    raw: Tensor
    error: Tensor
    between: float

    @classmethod
    def of(cls, X: Tensor, frame: Frame, dof: float) -> CommonParts | None:
        """Estimate the common parts; None if the clients have none.

        G_kj = <P_perp X_k, P_perp X_j> has the expectation a_k a_j mu off the diagonal, mu = ||P_perp M||_F^2. Its
        correlations are fitted by c_k c_j without the diagonal (`common_correlations`), so no noise enters, and a_k =
        c_k G_kk^1/2. P is the part of the frame's subspace for which this fit is best: a subspace of all clients
        absorbs M if sizes differ. The variance of a_k is (1 - c_k^2) G_kk / (dof mu), with the error of the mean.
        """
        if frame.size < 4:
            return None
        G, c = common_part_gram(X, frame)
        norms = G.diagonal().clamp(min=floor_energy(X)).sqrt()
        raw = c * norms
        known = frame.members & (raw > 0)
        if 2 * int(known.sum()) <= frame.size:
            return None
        mu = float(raw[known].median()) ** 2
        raw = raw / mu**0.5
        noise = (1 - c.square()).clamp(min=0.0) * norms.square()
        error = noise / (dof * mu) * (1 + float(noise[known].median()) / (frame.size * mu))
        sizes = raw[raw > 1 / MOST_SCALE]
        typical = float(error[known].median())
        between = float(1.4826 * (sizes - sizes.median()).abs().median()) ** 2 - typical
        return cls(raw, error, between if between > typical else 0.0)

    def lack(self) -> tuple[Tensor, Tensor]:
        """Return 1 - a_k (K,), and its variance (K,) for a member."""
        return 1 - self.raw, self.error + self.between


def client_scales(X: Tensor, frame: Frame, dof: float) -> Tensor:
    """Return the size a_k (K,) of every client's common part relative to the median member's, shrunk towards 1.

    a_k (`CommonParts`) is shrunk towards 1 by omega^2 / (omega^2 + s_k^2), where s_k^2 is its variance by noise and
    omega^2 that between members, from the median absolute deviation. A client without the common part, below 1 /
    ``MOST_SCALE``, has size 1, and so has everybody if the common part is not clear of the noise, or sizes differ by no
    more than their errors.
    """
    ones, low, found = X.new_ones(len(X)), 1 / MOST_SCALE, CommonParts.of(X, frame, dof)
    if found is None:
        return ones
    if found.between == 0 or float(found.error[frame.members].median()) > MOST_SCALE_ERROR**2:
        return ones
    shrunk = 1 + found.between / (found.between + found.error) * (found.raw - 1)
    return torch.where(found.raw > low, shrunk.clamp(low, MOST_SCALE), ones)


def common_part_gram(X: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix (K, K) off the subspace, and c (K,), at the frame's rank or less where the fit is best."""
    best = None
    for rank in range(frame.rank + 1):
        G = off_gram(X, replace(frame, basis=frame.basis[:, :rank]))
        c, agreement = common_correlations(G, frame.members)
        if best is None or agreement > best[0]:
            best = agreement, G, c
    assert best is not None
    agreement, G, c = best
    return G, c if agreement >= LEAST_AGREEMENT else torch.zeros_like(c)


def common_correlations(G: Tensor, members: Tensor) -> tuple[Tensor, float]:
    """Fit c_k c_j to the members' correlations G_kj / (G_kk G_jj)^1/2, k != j, by least squares; c is (K,).

    Also return the part of their squares that the fit explains. c is positive for most members. The c of a client that
    is no member is that of its regression on the members.
    """
    norms = G.diagonal().clamp(min=torch.finfo(G.dtype).tiny).sqrt()
    C = G / norms[:, None] / norms
    C = C - torch.diag(C.diagonal())
    own = C[members][:, members]
    b = torch.linalg.eigh(own).eigenvectors[:, -1]
    for _ in range(FIT_ROUNDS):
        square = b.square()
        fitted = own @ b / (square.sum() - square).clamp(min=torch.finfo(G.dtype).tiny)
        b = ((b + fitted) / 2).clamp(-1, 1)  # halfway, because the size of the whole step alternates
    b = b * (1.0 if float(b.median()) >= 0 else -1.0)
    fit = torch.outer(b, b)
    lost = (own - fit + torch.diag(fit.diagonal())).square().sum()
    total = own.square().sum().clamp(min=torch.finfo(G.dtype).tiny)
    c = C[:, members] @ b / b.square().sum().clamp(min=torch.finfo(G.dtype).tiny)
    c[members] = b
    return c, float(1 - lost / total)


def common_share(X: Tensor, frame: Frame) -> float:
    """Return the part of the members' energy off the subspace that is common to them, without bias by noise; 0 to 1.

    It is the mean of <P_perp X_j, P_perp X_k> over pairs of members, over the mean of ||P_perp X_k||^2.
    """
    G, n = off_gram(X[frame.members], frame), frame.size
    own = G.diagonal().sum()
    if n < 2 or own <= floor_energy(X) * n:
        return 0.0
    return max(0.0, float((G.sum() - own) / own) / (n - 1))


def off_gram(X: Tensor, frame: Frame) -> Tensor:
    """Return the inner products (K, K) of the clients' parts off the subspace; own coordinates count for the client."""
    rows, columns = frame.shared_block
    off = project_out(frame.basis, X)
    shared = off[:, :rows, :columns].flatten(1)
    G = shared @ shared.T
    return G + torch.diag(off.square().sum(dim=(1, 2)) - shared.square().sum(dim=1))


def cut_tails(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Return X with heavy rows, then heavy entries, of the leave-one-out residuals cut; each if most members have any.

    A row is heavy if its norm, over the client's median row norm, is one that Gaussian noise with these effective
    columns reaches with chance ``HEAVY_ERROR`` in any row of a client. If tails are heavy, rows are cut where Huber's
    constant cuts Gaussian rows. Entries likewise. Heavy rows of few clients are theirs, and are left for the verdict.
    """
    for size in (_row_norms, torch.abs):
        left_out = LeaveOneOut(X, weights, fit_frame(X, weights, frame.members, frame.rank, frame.shared_block))
        norms = size(left_out.R)
        typical = norms.flatten(1).median(dim=1).values[:, None, None]
        if float(typical[frame.members].median()) ** 2 <= left_out.floor:
            return X
        freedom = 1.0 if norms.shape == X.shape else left_out.benign.effective_dimensions()[1]
        chances = [HEAVY_ERROR / norms[0].numel(), CUT_ERROR]
        reach = (stats.chi2.isf(chances, freedom) / stats.chi2.median(freedom)) ** 0.5
        heavy = (norms > reach[0] * typical)[frame.members].flatten(1).any(dim=1)
        if 2 * int(heavy.sum()) > frame.size:
            kept = (reach[1] * typical / norms.clamp(min=torch.finfo(X.dtype).tiny)).clamp(max=1.0)
            X = X - left_out.R * (1 - kept) * left_out.scale[:, None, None]
    return X


def _row_norms(R: Tensor) -> Tensor:
    return torch.linalg.vector_norm(R, dim=2, keepdim=True)
