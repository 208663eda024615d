"""Closed forms for the error of the estimated subspace: what preliminary estimation error does to it.

This project's own derivations (Statement 2b), not the paper's. Clients of the planted model: X_k = M + U A_k + E_k,
s of them, entries of A_k (r x q) independent N(0, a^2 / q), so that each row of A_k has norm about a. The estimate is
the leading r-space of the centred scatter. Errors are ||sin Theta||_F^2, the sum of squared sines of all r principal
angles: its expectation has a closed form where that of the largest angle has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out

TRACY_WIDOM_MEAN = -1.2065335745820  # of the real (beta = 1) law


def subspace_distance(first: Tensor, second: Tensor) -> float:
    """||P_first - P_second||_F / sqrt 2 for orthonormal bases (p, r), (p, r'), from residuals.

    Equals ||sin Theta||_F when r = r'; a direction too many or too few adds 1/2 to its square.
    """
    squares = (project_out(second, first).square().sum(), project_out(first, second).square().sum())
    return float((sum(squares) / 2) ** 0.5)


def stability_bound(errors: Tensor, coefficients: Tensor) -> float:
    """Statement 2b (i): 2 ||E~||_2 / sigma_r(A~), which the largest sine never exceeds, whatever the errors are.

    ``errors`` E_k (s, p, q), ``coefficients`` A_k (s, r, q); the tilde centres over clients and puts blocks side by
    side.
    """
    wide = [(X - X.mean(dim=0)).permute(1, 0, 2).flatten(1) for X in (errors, coefficients)]  # (p, s*q), (r, s*q)
    size, signal = (torch.linalg.svdvals(matrix) for matrix in wide)
    return 2 * float(size[0] / signal[-1])


def first_order(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """E ||sin Theta||_F^2 to first order, white noise: sigma^2 (p - r) r q / (a^2 ((s - 1) q - r - 1)).

    sigma^2 (p - r) tr E[G^-1] with G = A~ A~' Wishart, (s - 1) q degrees of freedom, scale a^2 / q. Needs
    (s - 1) q > r + 1.
    """
    return noise**2 * (p - r) * r * q / (signal**2 * ((s - 1) * q - r - 1))


def first_order_given(
    coefficients: Tensor, spread: float, *, weights: Tensor | None = None, variances: Tensor | None = None
) -> float:
    """E ||sin Theta||_F^2 to first order given the coefficients A_k (s, r, q).

    spread * tr[G^-1 (sum_k w_k^2 v_k A~_k A~_k') G^-1],  G = sum_k w_k A~_k A~_k',  centred at the weighted mean.

    Parameters
    ----------
    spread : float
        tr(P_perp Sigma) of the noise covariance Sigma (p, p) of a column: sigma^2 (p - r) when white.
    weights : Tensor (s,), optional
        w_k that the estimate uses; equal where None.
    variances : Tensor (s,), optional
        v_k, the factor of client k's noise variance; 1 where None. With w_k = 1 / v_k the form is spread * tr G^-1.
    """
    ones = torch.ones(len(coefficients), dtype=coefficients.dtype)
    w = ones if weights is None else weights
    v = ones if variances is None else variances
    A = coefficients - torch.einsum("k,krq->rq", w / w.sum(), coefficients)
    inverse = torch.linalg.inv(torch.einsum("k,krq,ktq->rt", w, A, A))
    noise = torch.einsum("k,krq,ktq->rt", w.square() * v, A, A)
    return spread * float((inverse @ noise @ inverse).trace())


def spiked(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """E ||sin Theta||_F^2 at any level of white noise: r gamma (1 + l) / (l (l + gamma)), at most r.

    The centred updates are (s - 1) q samples with r spikes of l = a^2 / (q sigma^2) times the noise variance; the
    angle of each (Paul 2007; Benaych-Georges and Nadakuditi 2011) is taken at gamma = (p - r) / ((s - 1) q - r - 1),
    not p / ((s - 1) q), so that small noise gives ``first_order`` exactly. Relative to that: 1 + 1/l - gamma/l + ...
    """
    spike = signal**2 / (q * noise**2)
    gamma = (p - r) / ((s - 1) * q - r - 1)
    return r * min(1.0, gamma * (1 + spike) / (spike * (spike + gamma)))


def breakdown(p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """White noise per entry beyond which nothing of U is left: l^2 = gamma in ``spiked``, a q^(-1/2) gamma^(-1/4).

    The threshold of Baik, Ben Arous and Peche (2005), for many samples in many dimensions.
    """
    gamma = (p - r) / ((s - 1) * q - r - 1)
    return signal * q**-0.5 * gamma**-0.25


def coloured(basis: Tensor, covariance: Tensor, q: int, s: int, signal: float = 1.0) -> float:
    """E ||sin Theta||_F^2 for coloured noise beyond first order, given U (p, r) and a column's covariance Sigma (p, p).

    With l = a^2 / q, c = tr(U' Sigma U) / r, N = P_perp Sigma P_perp and T = ((l + c) I - N)^-1 P_perp, the sum of

        bias      ||T Sigma U||_F^2                           tilt of the expected scatter l U U' + Sigma; no s in it
        variance  r (l + c) tr(T N T) / ((s - 1) q - r - 1)   directions with more noise turn further

    is t, the squared tangents; sines follow as t / (1 + t / r). r from ``coloured_breakdown`` on, where T ends.
    """
    p, r = basis.shape
    level = signal**2 / q + float((basis.T @ covariance @ basis).trace()) / r
    off = project_out(basis, project_out(basis, covariance).T)  # N
    values, vectors = torch.linalg.eigh(off)
    if float(values[-1]) >= level:
        return float(r)
    bias = ((vectors.T @ project_out(basis, covariance @ basis)) / (level - values)[:, None]).square().sum()
    variance = r * level * (values / (level - values).square()).sum() / ((s - 1) * q - r - 1)
    tangents = float(bias + variance)
    return tangents / (1 + tangents / r)


def coloured_breakdown(correlation: float, q: int, signal: float = 1.0) -> float:
    """Noise per entry at which the noise's own leading direction outgrows the subspace, however many the clients.

    l + sigma^2 = sigma^2 lambda_max, and correlation^|i - j| has lambda_max = (1 + |rho|) / (1 - |rho|) for large p.
    """
    rho = abs(correlation)
    return signal * (q * 2 * rho / (1 - rho)) ** -0.5


def largest_sine(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """Largest sine to first order, white noise: sigma sqrt(q) / a times the root of the largest eigenvalue of G^-1 Z'Z.

    Z (p - r, r) and the factor of G are standard normal, so that eigenvalue is the largest root of two Wishart
    matrices, with p - r and n = (s - 1) q degrees of freedom; its log is mu + tau times a Tracy-Widom variable
    (Johnstone 2008, Theorem 1), whose mean is taken.
    """
    total = (s - 1) * q + p - r - 1
    small, large = sorted((r, p - r))
    gamma, phi = (2 * math.asin(math.sqrt((size - 0.5) / total)) for size in (small, large))
    mu = 2 * math.log(math.tan((phi + gamma) / 2))
    tau = (16 / total**2 / (math.sin(phi + gamma) ** 2 * math.sin(phi) * math.sin(gamma))) ** (1 / 3)
    return noise * math.sqrt(q) / signal * math.exp((mu + tau * TRACY_WIDOM_MEAN) / 2)


def unweighted_over_weighted(weights: Tensor) -> float:
    """Squared error without weights over that with them, noise variances 1 / w_k: sum(w) sum(1 / w) / s^2, at least 1.

    To leading order in s; ``first_order_given`` has no such limit.
    """
    return float(weights.sum() * weights.reciprocal().sum()) / len(weights) ** 2


def row_covariance(p: int, correlation: float) -> Tensor:
    """Covariance (p, p) of a column of planted coloured noise, correlation^|i - j|."""
    steps = torch.arange(p, dtype=torch.float64)
    return correlation ** (steps[:, None] - steps).abs()
