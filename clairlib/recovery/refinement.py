"""Refinement: a benign client keeps its own part inside the subspace and takes the benign average outside."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from clairlib.linalg.rank import gap_rank, numerical_ranks
from clairlib.linalg.subspace import project_out, squared_singular_values
from clairlib.recovery.effective_dimensions import EffectiveDimensions
from clairlib.recovery.frame import Frame, centred, floor_energy
from clairlib.recovery.leave_one_out import LeaveOneOut


@dataclass(frozen=True)
class Gain:
    """Estimated errors of local and refined updates: mean squared Frobenius norms over the benign clients.

    ``local`` is the noise of an update, ``inside`` its part in the subspace, ``off_subspace`` the outside noise after
    averaging. ``heterogeneity`` is the energy of benign differences that averaging removes. ``subspace_cost`` is the
    signal lost by the subspace's tilt, less the benign differences that it keeps.
    """

    local: float
    inside: float
    off_subspace: float
    heterogeneity: float
    subspace_cost: float

    def scaled(self, factor: float) -> Gain:
        """Return the gain for updates whose squared size is ``factor`` times as large."""
        return Gain(*(factor * value for value in astuple(self)))

    @property
    def relative(self) -> float:
        """1 - refined error / local error: the fraction of the local squared error that refinement removes."""
        refined = self.inside + self.off_subspace + self.heterogeneity + self.subspace_cost
        return 1.0 - refined / self.local if self.local > 0 else 0.0


def refined_core(X: Tensor, frame: Frame) -> Tensor:
    """Return P X_k + P_perp M for every client (K, p, q)."""
    return X - project_out(frame.basis, X - frame.mean)


def estimate_gain(
    X: Tensor, weights: Tensor, frame: Frame, known: float | None = None, left_out: LeaveOneOut | None = None,
    ranks: Tensor | None = None,
) -> Gain:
    """Estimate the gain of refinement over local updates (our form of the abstract's oracle gain, its claim C4).

    With s members, off-subspace noise N per member, effective dimensions p_e, q_e and structured heterogeneity h^2, the
    local error is N (1 + r / p_e) and the refined error is N r / p_e + N / s + h^2 (1 - 1/s) + r (N - h^2) / (q_e s).
    The last term is the first-order cost of the estimated subspace, whose tilt keeps a part of h^2.

    The energy V of leave-one-out residuals is (N + h^2) (1 + r / (q_e (s - 1))), because a subspace fitted without the
    member leaves that much more outside. h^2 is estimated from the singular values that stand above the noise in the
    members' own spectra (gap of the mean squared singular values), less the noise in them; it is 0 for adapters of rank
    below 8. Not guaranteed: benign differences that look like noise, spread over all directions, cannot be told from it
    by any method that sees one update per client. They can if ``known``, the expected ||E_k||_F^2 of a client of weight
    1, is given: residual energy beyond its part p_e / (p_e + r) outside the subspace then counts as heterogeneity.
    ``left_out`` are all residuals and ``ranks`` (K,) the updates' ranks, if known.
    """
    left_out = left_out or LeaveOneOut(X, weights, frame)
    s, r, R = frame.size, frame.rank, left_out.benign.R
    V = float(R.square().sum(dim=(1, 2)).mean())
    if s < 2 or floor_energy(X) >= V:
        return Gain(0.0, 0.0, 0.0, 0.0, 0.0)
    own = numerical_ranks(squared_singular_values(X[frame.members])) if ranks is None else ranks[frame.members]
    rank = int(own.median())
    squares, rest = _structure(R, left_out.squares[frame.members], rank)
    spread = left_out.benign if rest is R else EffectiveDimensions(rest, frame.shared_block)
    p_eff, q_eff = spread.effective_dimensions()
    V /= 1 + r / (q_eff * (s - 1))
    noise = V - min(energy_above_noise(squares, V, p_eff, q_eff) * s / (s - 1), V)
    h2 = _kept_out(X, weights, frame, rank, p_eff, q_eff) if squares.shape[1] else 0.0
    if known is not None:
        noise = min(noise, known * p_eff / (p_eff + r))
        h2 = max(h2, V - noise)
    inside = noise * r / p_eff
    return Gain(noise + inside, inside, noise / s, h2 * (1 - 1 / s), r * (noise - h2) / (q_eff * s))


def _kept_out(X: Tensor, weights: Tensor, frame: Frame, rank: int, rows: float, columns: float) -> float:
    """Return h^2 of the structure outside a subspace fitted to all members: the part that averaging removes."""
    s = frame.size
    residuals = project_out(frame.basis, centred(X, weights, frame)[frame.members])  # H_k enters times 1 - 1/s
    energy = float(residuals.square().sum(dim=(1, 2)).mean())
    squares, _ = _structure(residuals, squared_singular_values(residuals), rank)
    return energy_above_noise(squares, energy, rows, columns) * (s / (s - 1)) ** 2


def _structure(R: Tensor, squares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the squared singular values (s, g) of the residuals above the noise, and the residuals without them.

    g is from the gap of the mean spectrum, because that of one client is too rough to show a gap. At most ``rank``
    directions are examined, the rank of the median update, to which an adapter confines its noise.
    """
    g = gap_rank(squares.mean(dim=0)[:rank], rank // 2)
    if not g:
        return squares[:, :0], R
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    return S[:, :g].square(), (U[:, :, g:] * S[:, None, g:]) @ Vh[:, g:]


def energy_above_noise(squares: Tensor, V: float, rows: float, columns: float) -> float:
    """Return the energy of the signal behind singular values that noise has raised, as a mean over clients.

    y^2 = (x^2 + a) (x^2 + b) / x^2 for a signal x in noise with a = sigma^2 rows, b = sigma^2 columns (Benaych-Georges
    and Nadakuditi 2012), solved for x^2. sigma^2 is the rest of V divided by rows x columns, iterated until it stays.
    """
    noise, energy = V, 0.0
    for _ in range(100):
        a, b = noise / columns, noise / rows
        middle = squares - a - b
        signal = (middle + (middle.square() - 4 * a * b).clamp(min=0.0).sqrt()) / 2
        energy = float(signal.clamp(min=0.0).sum(dim=1).mean())
        if abs(V - energy - noise) <= 1e-9 * V:
            break
        noise = max(V - energy, 0.0)
    return energy
