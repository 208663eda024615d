"""Closed forms of Statement 4: what refinement leaves of a benign client's error, and where it stops paying.

Model: X_k = M + U A_k + H_k + E_k for s benign clients, entries of E_k of variance noise^2, H_k independent between
clients, off the subspace, of mean zero and size h. A_k has independent Gaussian entries and rows of unit expected
squared norm. All errors are mean squared Frobenius norms over the benign clients. This project's own derivations for
its reconstruction of the method (arXiv:2605.21217); proofs in notebook 05.
"""

from __future__ import annotations

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
    """A refined update's error: noise kept inside the subspace, averaged noise outside it, benign differences wiped
    out, and what the error of the estimated subspace adds (negative where it saves benign differences)."""

    inside: float
    off_subspace: float
    heterogeneity: float
    subspace_cost: float

    @property
    def total(self) -> float:
        """Error of the refined update."""
        return sum(astuple(self))


def local_error(noise: float, p: int, q: int) -> float:
    """sigma^2 p q."""
    return noise**2 * p * q


def oracle_terms(*, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0) -> Terms:
    """Told P and S: sigma^2 r q, sigma^2 (p - r) q / s, h^2 (1 - 1/s). Exact in expectation."""
    variance = noise**2
    return Terms(variance * r * q, variance * (p - r) * q / s, heterogeneity**2 * (1 - 1 / s), 0.0)


def estimated_terms(
    *, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0, order: int = 2
) -> Terms:
    """Told S and r, P estimated: the oracle's terms and what the tilt of the subspace adds.

    With tau^2 = h^2 / ((p - r) q), n = (s - 1) q and kappa = (p - r) (n - r) L / s, L as in ``inverse_signal``,

        inside         + (sigma^2 + tau^2)^2 kappa                                     (order 2)
        subspace cost  (sigma^2 - tau^2) (p - r) r / s + 2 (sigma^4 - tau^4) kappa     (order 1, order 2)

    First order holds for heterogeneity of any rank, second order for dense heterogeneity. The relative error is of the
    order of ((sigma^2 + tau^2) q)^2: the noise of a row against its signal of size one.
    """
    terms = oracle_terms(noise=noise, p=p, q=q, r=r, s=s, heterogeneity=heterogeneity)
    variance, spread = noise**2, heterogeneity**2 / ((p - r) * q)
    kappa = (p - r) * ((s - 1) * q - r) * inverse_signal(q, r, s) / s if order == 2 else 0.0
    cost = (variance - spread) * (p - r) * r / s + (2 * (variance**2 - spread**2) * kappa if kappa else 0.0)
    inside = terms.inside + ((variance + spread) ** 2 * kappa if kappa else 0.0)
    return Terms(inside, terms.off_subspace, terms.heterogeneity, cost)


def inverse_signal(q: int, r: int, s: int) -> float:
    """L = E tr (sum_k A~_k A~_k')^-1 = r q / (n - r - 1) for centred Gaussian A~, n = (s - 1) q; inf for n <= r + 1."""
    freedom = (s - 1) * q - r - 1
    return r * q / freedom if freedom > 0 else inf


def gain(*, noise: float, p: int, q: int, r: int, s: int, heterogeneity: float = 0.0, order: int = 2) -> float:
    """Local error less refined error; to first order (sigma^2 - tau^2) (p - r) (n - r) / s with n = (s - 1) q.

    Needs n > r to first order, n > r + 1 to second. For n <= r refined is local and the gain zero, which the closed
    form does not give.
    """
    terms = estimated_terms(noise=noise, p=p, q=q, r=r, s=s, heterogeneity=heterogeneity, order=order)
    return local_error(noise, p, q) - terms.total


def boundary_heterogeneity(*, noise: float, p: int, q: int, r: int, s: int, order: int = 2) -> float:
    """Heterogeneity h at which refinement stops paying: the root of ``gain``.

    First order, and with P told: h^2 = sigma^2 (p - r) q, whatever s is. Second order: tau^2 solves
    L tau^4 - (1 + 2 L sigma^2) tau^2 + sigma^2 - 3 L sigma^4 = 0; nan where there is no root (too noisy).
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
    """Sample size n at which refinement stops paying where sigma^2 = noise^2 / n: the root of ``gain``.

    First order: noise^2 (p - r) q / h^2. Second order: by bisection below it.
    """
    first = noise**2 * (p - r) * q / heterogeneity**2
    low, high = (0.5 * first, first) if order == 2 else (first, first)
    for _ in range(60 if order == 2 else 0):
        n = (low + high) / 2
        pays = gain(noise=noise / sqrt(n), p=p, q=q, r=r, s=s, heterogeneity=heterogeneity) > 0
        low, high = (n, high) if pays else (low, n)
    return high


def fewest_clients(q: int, r: int) -> float:
    """s must exceed 1 + r / q: with (s - 1) q <= r the subspace holds all differences, and refined is local."""
    return 1 + r / q


def weighted_oracle_terms(
    *, noise: float, p: int, q: int, r: int, weights: Sequence[float], told: bool = True
) -> Terms:
    """Told P and S, client k's noise variance noise^2 / w_k, averaged with weights w_k (or, not told, with equal ones).

    inside sigma^2 r q mean(1/w_k); off-subspace sigma^2 (p - r) q / sum w, not told sigma^2 (p - r) q mean(1/w_k) / s.
    """
    s, variance = len(weights), noise**2
    inverse = sum(1 / w for w in weights) / s
    averaged = 1 / sum(weights) if told else inverse / s
    return Terms(variance * r * q * inverse, variance * (p - r) * q * averaged, 0.0, 0.0)


def stein_error(frame: Frame, noise: float) -> float:
    """Unbiased estimate of the refined error (equal weights, S and r told) by who knows the noise of a local update.

    Refining is to keep the mean and to cut the centred stack D (p, n), n = (s - 1) q, down to rank r. Stein's identity
    (divergence of the cut: Candes, Sing-Long, Trzasko 2013, arXiv:1210.4139), with y_i the singular values of D, gives

        s err = sum_{j>r} y_j^2 - s sigma^2 p q + 2 sigma^2 (p q + r (|p - n| + r) + 2 sum_{i<=r<j} z_ij),
        z_ij = y_i^2 / (y_i^2 - y_j^2),

    for any A_k and any H_k: heterogeneity that looks like noise included. Needs Gaussian noise and r < min(p, n).
    """
    p, q = frame.mean.shape
    s, r, variance = frame.size, frame.rank, noise**2
    n = (s - 1) * q
    squares = frame.eigenvalues.clamp(min=0.0)[: min(p, n)]
    top, rest = squares[:r, None], squares[None, r:]
    freedom = p * q + r * (abs(p - n) + r) + 2 * float((top / (top - rest)).sum())
    return (float(rest.sum()) + 2 * variance * freedom) / s - variance * p * q


def measured_terms(errors: Tensor, targets: Tensor, basis: Tensor) -> Terms:
    """The errors e_k (s, p, q) of benign clients split by the true basis; the terms add up to their mean energy.

    inside ||P e_k||^2; off_subspace ||P_perp mean e||^2; heterogeneity ||P_perp (Theta_k - mean Theta)||^2, what
    averaging would wipe out; subspace_cost ||P_perp (e_k - mean e)||^2 less that. Means over the clients.
    """
    outside = project_out(basis, errors)
    mean = outside.mean(dim=0)
    wiped = _energy(project_out(basis, targets - targets.mean(dim=0)))
    return Terms(_energy(errors - outside), float(mean.square().sum()), wiped, _energy(outside - mean) - wiped)


def _energy(blocks: Tensor) -> float:
    """Mean squared Frobenius norm of blocks (n, p, q)."""
    return float(blocks.square().sum(dim=(1, 2)).mean())


@dataclass(frozen=True)
class TwoReadings:
    """The same updates (K, p, q) read in two ways, both within the model, with the same subspace and benign clients.

    ``different``: noise ``noise`` and dense heterogeneity, targets M + U A_k + G_k. ``alike``: the clients are alike
    off the subspace, targets M + U A_k, and G_k is noise: noise sqrt(sigma^2 + tau^2).
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
    """X_k = M + U A_k + G_k + E_k, entries of G of standard deviation ``spread`` (tau), of E ``noise`` (sigma).

    A_k has entries of variance 1/q - tau^2, so that A_k + U'G_k of the first reading has rows of unit expected size.
    """
    scale = sqrt(1 - spread**2 * q)
    base = planted(share=share, K=K, p=p, q=q, r=r, noise_std=0.0, common_norm=1 / scale, generator=generator)
    G, E = (torch.randn(K, p, q, generator=generator, dtype=torch.float64) for _ in range(2))
    alike = scale * base.targets
    different = alike + spread * G
    return TwoReadings(different + noise * E, different, alike, base.benign, noise, sqrt(noise**2 + spread**2))


def crossing(places: np.ndarray, gains: np.ndarray) -> tuple[float, float]:
    """Place at which the mean of gains (draws, places) falls to zero, and its standard error; nan if it does not.

    Linear between neighbours. The draws share their randomness over places, so the error is that of the gain
    interpolated at the crossing, over the slope.
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
