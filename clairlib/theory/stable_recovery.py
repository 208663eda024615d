"""Closed forms for the error that estimation noise causes in the estimated subspace.

They are this project's own derivations (Statement 2b), not the paper's. s clients follow X_k = M + U A_k + E_k. Entries
of A_k (r x q) are independent N(0, a^2 / q), so each row of A_k has norm about a, the ``signal``; ``noise`` is the
standard deviation sigma of an entry of E_k. The estimate is the leading r-dimensional eigenspace of the centred
scatter. Errors are ||sin Theta||_F^2, the sum of squared sines of all r principal angles, whose mean has a closed form.
"""

import math

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out

TRACY_WIDOM_MEAN = -1.2065335745820  # mean of the real (beta = 1) law


def subspace_distance(first: Tensor, second: Tensor) -> float:
    """Return ||P_first - P_second||_F / sqrt 2 for orthonormal bases (p, r) and (p, r'), computed from residuals.

    It equals ||sin Theta||_F when r = r'. Each direction too many or too few adds 1/2 to its square.
    """
    squares = (project_out(second, first).square().sum(), project_out(first, second).square().sum())
    return float((sum(squares) / 2) ** 0.5)


def stability_bound(errors: Tensor, coefficients: Tensor) -> float:
    """Return the bound 2 ||E~||_2 / sigma_r(A~) on the largest sine, which holds for all errors (Statement 2b (i)).

    Blocks of ``errors`` E_k (s, p, q) and ``coefficients`` A_k (s, r, q) are centred over clients and placed in a row.
    """
    wide = [(X - X.mean(dim=0)).permute(1, 0, 2).flatten(1) for X in (errors, coefficients)]  # (p, s*q), (r, s*q)
    size, signal = (torch.linalg.svdvals(matrix) for matrix in wide)
    return 2 * float(size[0] / signal[-1])


def first_order(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """Return E ||sin Theta||_F^2 to first order in white noise: sigma^2 (p - r) r q / (a^2 ((s - 1) q - r - 1)).

    This is sigma^2 (p - r) tr E[G^-1], where G = A~ A~' is Wishart of (s - 1) q > r + 1 degrees and scale a^2 / q.
    """
    return noise**2 * (p - r) * r * q / (signal**2 * ((s - 1) * q - r - 1))


def first_order_given(
    coefficients: Tensor, spread: float, *, weights: Tensor | None = None, variances: Tensor | None = None
) -> float:
    """Return E ||sin Theta||_F^2 to first order, given the coefficients A_k (s, r, q).

        spread * tr[G^-1 (sum_k w_k^2 v_k A~_k A~_k') G^-1],  G = sum_k w_k A~_k A~_k',  centred at the weighted mean.

    ``spread`` is tr(P_perp Sigma) of the noise covariance Sigma (p, p) of a column: sigma^2 (p - r) when white.
    ``weights`` w_k (s,) are those of the estimate and ``variances`` v_k (s,) factors of the clients' noise variance;
    all are 1 if None. With w_k = 1 / v_k the result is spread * tr G^-1.
    """
    ones = torch.ones(len(coefficients), dtype=coefficients.dtype)
    w = ones if weights is None else weights
    v = ones if variances is None else variances
    A = coefficients - torch.einsum("k,krq->rq", w / w.sum(), coefficients)
    inverse = torch.linalg.inv(torch.einsum("k,krq,ktq->rt", w, A, A))
    noise = torch.einsum("k,krq,ktq->rt", w.square() * v, A, A)
    return spread * float((inverse @ noise @ inverse).trace())


def spiked(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """Return E ||sin Theta||_F^2 at any level of white noise: r gamma (1 + l) / (l (l + gamma)), at most r.

    The centred updates are (s - 1) q samples with r spikes, each l = a^2 / (q sigma^2) times the noise variance. The
    angle of each (Paul 2007; Benaych-Georges and Nadakuditi 2011) is taken at gamma = (p - r) / ((s - 1) q - r - 1)
    instead of p / ((s - 1) q): the ratio to ``first_order``, 1 + 1/l - gamma/l + .., is exact for small noise.
    """
    spike = signal**2 / (q * noise**2)
    gamma = (p - r) / ((s - 1) * q - r - 1)
    return r * min(1.0, gamma * (1 + spike) / (spike * (spike + gamma)))


def breakdown(p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """Return the white noise per entry beyond which nothing of U is left, a q^(-1/2) gamma^(-1/4).

    There l^2 = gamma in ``spiked``, the threshold of Baik, Ben Arous and Peche (2005) in many dimensions.
    """
    gamma = (p - r) / ((s - 1) * q - r - 1)
    return signal * q**-0.5 * gamma**-0.25


def coloured(basis: Tensor, covariance: Tensor, q: int, s: int, signal: float = 1.0) -> float:
    """Return E ||sin Theta||_F^2 for coloured noise beyond first order.

    ``basis`` is U (p, r), and ``covariance`` is the noise covariance Sigma (p, p) of a column. Let l = a^2 / q, c =
    tr(U' Sigma U) / r, N = P_perp Sigma P_perp and T = ((l + c) I - N)^-1 P_perp. The squared tangents t are the sum of

        bias      ||T Sigma U||_F^2                           tilt of the expected scatter l U U' + Sigma; no s in it
        variance  r (l + c) tr(T N T) / ((s - 1) q - r - 1)   directions with more noise turn further

    and the squared sines are t / (1 + t / r). From ``coloured_breakdown`` on T does not exist, and the result is r.
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
    """Return the noise per entry at which its leading direction outgrows the subspace, for any number of clients.

    Then l + sigma^2 = sigma^2 lambda_max; correlation^|i - j| has lambda_max = (1 + |rho|) / (1 - |rho|) for large p.
    """
    rho = abs(correlation)
    return signal * (q * 2 * rho / (1 - rho)) ** -0.5


def largest_sine(noise: float, p: int, q: int, s: int, r: int, signal: float = 1.0) -> float:
    """Return the largest sine to first order in white noise.

    It is sigma sqrt(q) / a times the root of the largest eigenvalue of G^-1 Z'Z, two Wishart matrices of (s - 1) q and
    p - r degrees of freedom. Its log is mu + tau times a Tracy-Widom variable (Johnstone 2008, Theorem 1) at its mean.
    """
    total = (s - 1) * q + p - r - 1
    small, large = sorted((r, p - r))
    gamma, phi = (2 * math.asin(math.sqrt((size - 0.5) / total)) for size in (small, large))
    mu = 2 * math.log(math.tan((phi + gamma) / 2))
    tau = (16 / total**2 / (math.sin(phi + gamma) ** 2 * math.sin(phi) * math.sin(gamma))) ** (1 / 3)
    return noise * math.sqrt(q) / signal * math.exp((mu + tau * TRACY_WIDOM_MEAN) / 2)


def unweighted_over_weighted(weights: Tensor) -> float:
    """Return sum(w) sum(1 / w) / s^2, the leading ratio of errors without and with weights, at variances 1 / w_k."""
    return float(weights.sum() * weights.reciprocal().sum()) / len(weights) ** 2


def row_covariance(p: int, correlation: float) -> Tensor:
    """Return the covariance (p, p) of a column of planted coloured noise, correlation^|i - j|."""
    steps = torch.arange(p, dtype=torch.float64)
    return correlation ** (steps[:, None] - steps).abs()
