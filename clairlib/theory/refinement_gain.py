"""Closed forms of Statement 4: the error of a refined benign update, and the point where refinement stops paying.

The model is X_k = M + U A_k + H_k + E_k for s benign clients. The estimation noise E_k has entries of variance noise^2.
The heterogeneity H_k is independent between clients, off the subspace, of mean zero and size h. A_k has independent
Gaussian entries and rows of unit expected squared norm. Errors are mean squared Frobenius norms over the benign
clients. All are own derivations for our reconstruction of the method (arXiv:2605.21217); proofs are in notebook 05.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import inf, sqrt

import numpy as np
import torch
from torch import Generator, Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import Frame
from clairlib.simulate import planted


@dataclass(frozen=True)
class Terms:
    """Parts of the error of a refined update.

    ``inside`` is the noise kept inside the subspace, ``off_subspace`` the averaged noise off it, ``heterogeneity`` the
    error from averaging benign differences away. ``subspace_cost`` (may be negative) is what estimating P adds.
    """

    inside: float
    off_subspace: float
    heterogeneity: float
    subspace_cost: float

    @property
    def total(self) -> float:
        """Error of the refined update, the sum of the terms."""
        return sum(astuple(self))


def local_error(noise: float, p: int, q: int) -> float:
    """Return the error of a client's own update, sigma^2 p q."""
    return noise**2 * p * q


def oracle_terms(*, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0) -> Terms:
    """Return the exact expected terms when P and S are told: sigma^2 r q, sigma^2 (p - r) q / s, h^2 (1 - 1/s)."""
    variance = noise**2
    return Terms(variance * r * q, variance * (p - r) * q / s, heterogeneity**2 * (1 - 1 / s), 0.0)


def estimated_terms(
    *, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0, order: int = 2
) -> Terms:
    """Return the error terms when S and r are told and P is estimated.

    They are the oracle's terms plus the effect of the subspace's tilt. With tau^2 = h^2 / ((p - r) q), n = (s - 1) q,
    kappa = (p - r) (n - r) L / s and L as in ``inverse_signal``, the two changed terms are

        inside         + (sigma^2 + tau^2)^2 kappa                                     (order 2)
        subspace cost  (sigma^2 - tau^2) (p - r) r / s + 2 (sigma^4 - tau^4) kappa     (order 1, order 2)

    The first order holds for heterogeneity of any rank, the second for dense heterogeneity. The relative error is of
    the order of the square of (sigma^2 + tau^2) q, a row's noise over its signal energy.
    """
    terms = oracle_terms(noise=noise, p=p, q=q, r=r, s=s, heterogeneity=heterogeneity)
    variance, spread = noise**2, heterogeneity**2 / ((p - r) * q)
    kappa = (p - r) * ((s - 1) * q - r) * inverse_signal(q, r, s) / s if order == 2 else 0.0
    cost = (variance - spread) * (p - r) * r / s + (2 * (variance**2 - spread**2) * kappa if kappa else 0.0)
    inside = terms.inside + ((variance + spread) ** 2 * kappa if kappa else 0.0)
    return Terms(inside, terms.off_subspace, terms.heterogeneity, cost)


def inverse_signal(q: int, r: int, s: int) -> float:
    """Return L = E tr (sum_k A~_k A~_k')^-1 = r q / (n - r - 1) for Gaussian A~, n = (s - 1) q; inf for n <= r + 1."""
    freedom = (s - 1) * q - r - 1
    return r * q / freedom if freedom > 0 else inf


def gain(*, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0, order: int = 2) -> float:
    """Return the local error minus the refined error.

    To first order it is (sigma^2 - tau^2) (p - r) (n - r) / s with n = (s - 1) q, for n > r; the second order needs n >
    r + 1. For n <= r the gain is zero, which the closed form does not give.
    """
    terms = estimated_terms(noise=noise, p=p, q=q, r=r, s=s, heterogeneity=heterogeneity, order=order)
    return local_error(noise, p, q) - terms.total


def boundary_heterogeneity(*, noise: float, p: int, q: int, r: int, s: int, order: int = 2) -> float:
    """Return the heterogeneity h at which refinement stops paying, the root of ``gain``.

    To first order, and also with P told, h^2 = sigma^2 (p - r) q for every s. To second order tau^2 solves L tau^4 - (1
    + 2 L sigma^2) tau^2 + sigma^2 - 3 L sigma^4 = 0; nan if there is no root, because there is too much noise.
    """
    variance, L = noise**2, inverse_signal(q, r, s) if order == 2 else 0.0
    if L == 0.0:
        return sqrt(variance * (p - r) * q)
    slope = 1 + 2 * L * variance
    inner = slope**2 - 4 * L * (variance - 3 * L * variance**2)
    spread = 2 * (variance - 3 * L * variance**2) / (slope + sqrt(inner)) if inner >= 0 and L < inf else -1.0
    return sqrt(spread * (p - r) * q) if spread >= 0 else float("nan")


def boundary_samples(
    *, noise: float, heterogeneity: float, p: int, q: int, r: int, s: int, order: int = 2
) -> float:
    """Return the sample size n at which refinement stops paying if sigma^2 = noise^2 / n, the root of ``gain``.

    To first order it is noise^2 (p - r) q / h^2. The second-order root is found by bisection below that value.
    """
    first = noise**2 * (p - r) * q / heterogeneity**2
    low, high = (0.5 * first, first) if order == 2 else (first, first)
    for _ in range(60 if order == 2 else 0):
        n = (low + high) / 2
        pays = gain(noise=noise / sqrt(n), p=p, q=q, r=r, s=s, heterogeneity=heterogeneity) > 0
        low, high = (n, high) if pays else (low, n)
    return high


def fewest_clients(q: int, r: int) -> float:
    """Return 1 + r / q, which s must exceed: else the subspace holds all differences and nothing is refined."""
    return 1 + r / q


def weighted_oracle_terms(
    *, noise: float, p: int, q: int, r: int, weights: Sequence[float], told: bool = True
) -> Terms:
    """Return the error terms when P and S are told and client k's noise variance is noise^2 / w_k.

    ``inside`` is sigma^2 r q mean(1/w_k). ``off_subspace`` is sigma^2 (p - r) q / sum w if the mean is ``told`` the
    weights w_k, else, with equal weights, sigma^2 (p - r) q mean(1/w_k) / s.
    """
    s, variance = len(weights), noise**2
    inverse = sum(1 / w for w in weights) / s
    averaged = 1 / sum(weights) if told else inverse / s
    return Terms(variance * r * q * inverse, variance * (p - r) * q * averaged, 0.0, 0.0)


def stein_error(frame: Frame, noise: float) -> float:
    """Estimate the refined error without bias from the frame and the noise, for equal weights, with S and r told.

    ``noise`` is the standard deviation of an entry's noise. Refinement keeps the mean and truncates the centred stack D
    (p, n), n = (s - 1) q, with singular values y_i, to rank r. Stein's identity (divergence of the truncation: Candes,
    Sing-Long, Trzasko 2013, arXiv:1210.4139) gives

        s err = sum_{j>r} y_j^2 - s sigma^2 p q + 2 sigma^2 (p q + r (|p - n| + r) + 2 sum_{i<=r<j} z_ij),

    with z_ij = y_i^2 / (y_i^2 - y_j^2). It holds for Gaussian noise, any A_k and H_k, and r < min(p, n).
    """
    p, q = frame.mean.shape
    s, r, variance = frame.size, frame.rank, noise**2
    n = (s - 1) * q
    squares = frame.eigenvalues.clamp(min=0.0)[: min(p, n)]
    top, rest = squares[:r, None], squares[None, r:]
    freedom = p * q + r * (abs(p - n) + r) + 2 * float((top / (top - rest)).sum())
    return (float(rest.sum()) + 2 * variance * freedom) / s - variance * p * q


def measured_terms(errors: Tensor, targets: Tensor, basis: Tensor) -> Terms:
    """Split the errors e_k (s, p, q) of benign clients by the true basis; the terms sum to their mean energy.

    As means over the clients, ``inside`` is ||P e_k||^2, ``off_subspace`` is ||P_perp mean e||^2, ``heterogeneity`` is
    ||P_perp (Theta_k - mean Theta)||^2, and ``subspace_cost`` is ||P_perp (e_k - mean e)||^2 minus ``heterogeneity``.
    """
    outside = project_out(basis, errors)
    mean = outside.mean(dim=0)
    wiped = _energy(project_out(basis, targets - targets.mean(dim=0)))
    return Terms(_energy(errors - outside), float(mean.square().sum()), wiped, _energy(outside - mean) - wiped)


def _energy(blocks: Tensor) -> float:
    """Return the mean squared Frobenius norm of blocks (n, p, q)."""
    return float(blocks.square().sum(dim=(1, 2)).mean())


@dataclass(frozen=True)
class TwoReadings:
    """Two readings of one set of updates (K, p, q), both within the model, with one subspace and benign set.

    In ``different`` the targets are M + U A_k + G_k: G_k is dense heterogeneity, and the noise has standard deviation
    ``noise``. In ``alike`` they are M + U A_k, and the noise has ``noise_alike`` = sqrt(sigma^2 + tau^2).
    """

    updates: Tensor
    different: Tensor
    alike: Tensor
    benign: Tensor
    noise: float
    noise_alike: float


def two_readings(
    *, noise: float, spread: float, K: int, share: float, p: int, q: int, r: int, generator: Generator
) -> TwoReadings:
    """Draw X_k = M + U A_k + G_k + E_k, which has two readings; ``share`` of the clients is contaminated.

    Entries of G_k have standard deviation ``spread`` (tau), entries of E_k ``noise`` (sigma). Entries of A_k have
    variance 1/q - tau^2, so that in the first reading A_k + U'G_k has rows of unit expected squared norm.
    """
    scale = sqrt(1 - spread**2 * q)
    base = planted(share=share, K=K, p=p, q=q, r=r, noise_std=0.0, common_norm=1 / scale, generator=generator)
    G, E = (torch.randn(K, p, q, generator=generator, dtype=torch.float64) for _ in range(2))
    alike = scale * base.targets
    different = alike + spread * G
    return TwoReadings(different + noise * E, different, alike, base.benign, noise, sqrt(noise**2 + spread**2))


def crossing(places: np.ndarray, gains: np.ndarray) -> tuple[float, float]:
    """Return the place where the mean of ``gains`` (draws, places) falls to zero, and its standard error, or two nan.

    The mean is interpolated linearly between neighbouring places. A draw uses the same randomness at all places, so the
    standard error is that of the gain interpolated at the crossing, divided by the slope.
    """
    mean = gains.mean(axis=0)
    falls = np.flatnonzero((mean[:-1] > 0) & (mean[1:] <= 0))
    if not len(falls):
        return float("nan"), float("nan")
    i = falls[0]
    part = mean[i] / (mean[i] - mean[i + 1])
    slope = (mean[i + 1] - mean[i]) / (places[i + 1] - places[i])
    there = gains[:, i] + part * (gains[:, i + 1] - gains[:, i])
    error = there.std(ddof=1) / len(there) ** 0.5 / abs(slope)
    return float(places[i] + part * (places[i + 1] - places[i])), float(error)
