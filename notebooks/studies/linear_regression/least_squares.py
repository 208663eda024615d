"""Linear regression: least-squares fits as client updates, and refitting benign clients together after CLAIR.

Client k has X_k (n_k, p) and Y_k (n_k, q) = X_k Theta_k + noise of variance sigma_k^2. Its update is the least-squares
estimate, which has covariance sigma_k^2 (X_k'X_k)^-1 in every column. The shared subspace is a subspace of the
features, that is, of the rows of Theta.

Unlike an adapter, a regression knows the noise variance of its own update, and a server that obtains X_k'X_k can refit
clients together. ``pool`` uses both after CLAIR has found the benign clients. Everything in this file is this project's
own, except ``spectral``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import Frame, fit_frame
from clairlib.theory.refinement_gain import Terms

ROUNDS = 3  # rounds of alternating least squares; the start is close, so a fourth round changes no result
WORTH = 3.0  # threshold for a direction; pure noise reaches (p^.5 + (s q)^.5)^2 <= 2 (p + s q) and a little more
SINGULAR = 1e-10  # features are dependent if a diagonal entry of R is below this multiple of the largest


@dataclass(frozen=True)
class Fits:
    """Least-squares fits of K clients.

    ``estimates`` (K, p, q). ``gram`` (K, p, p) holds X_k'X_k, ``moments`` (K, p, q) holds X_k'Y_k. ``noise`` (K,) is
    the residual variance, one for all q responses. ``freedom`` (K,) = (n_k - p) q is its degrees of freedom.
    """

    estimates: Tensor
    gram: Tensor
    moments: Tensor
    noise: Tensor
    freedom: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights (K,) for `CLAIR.fit`: one over the mean variance of an entry of the estimate."""
        p = self.gram.shape[1]
        return p / (self.noise * torch.linalg.inv(self.gram).diagonal(dim1=1, dim2=2).sum(dim=1))

    @property
    def errors(self) -> Tensor:
        """Expected squared errors (K,) of the estimates: the ``expected_sq_error`` of `CLAIR.fit`."""
        return self.estimates.shape[1] * self.estimates.shape[2] / self.weights

    @property
    def precision(self) -> Tensor:
        """Estimate (K,) of 1 / sigma_k^2; unbiased for Gaussian noise and more than two degrees of freedom."""
        return (1 - 2 / self.freedom).clamp(min=0.0) / self.noise


def least_squares(X: Sequence[Tensor], Y: Sequence[Tensor]) -> Fits:
    """Fit every client separately; sample sizes may differ.

    Parameters
    ----------
    X : sequence of Tensor (n_k, p)
    Y : sequence of Tensor (n_k, q)

    Raises
    ------
    ValueError
        A client has at most p samples, or linearly dependent features.
    """
    fits = [_fit(k, x.double(), y.double()) for k, (x, y) in enumerate(zip(X, Y, strict=True))]
    columns = [torch.stack(column) for column in zip(*fits, strict=True)]
    return Fits(*columns)


def _fit(k: int, X: Tensor, Y: Tensor) -> tuple[Tensor, ...]:
    n, p = X.shape
    if n <= p:
        raise ValueError(f"client {k} has {n} samples; least squares with p = {p} features needs more than p")
    Q, R = torch.linalg.qr(X)
    diagonal = R.diagonal().abs()
    if float(diagonal.min()) <= SINGULAR * float(diagonal.max()):
        raise ValueError(f"client {k} has linearly dependent features; drop a column of X")
    estimate = torch.linalg.solve_triangular(R, Q.T @ Y, upper=True)
    freedom = torch.tensor((n - p) * Y.shape[1], dtype=torch.float64)
    return estimate, R.T @ R, X.T @ Y, (Y - X @ estimate).square().sum() / freedom, freedom


def oracle_terms(gram: Tensor, noise: Tensor, basis: Tensor, weights: Tensor, responses: int) -> Terms:
    """Return the exact expected error of refined least-squares estimates, told P and S, given benign designs.

    This is Statement 4 with the estimators' covariance sigma_k^2 (X_k'X_k)^-1 in place of sigma^2 I, averaged with
    weights w. Inside the subspace the error is q mean_k sigma_k^2 tr P (X_k'X_k)^-1; outside it is q sum_k w_k^2
    sigma_k^2 tr P_perp (X_k'X_k)^-1 / (sum w)^2. There is no heterogeneity.

    Parameters
    ----------
    gram : Tensor (s, p, p)
        X_k'X_k of the benign clients.
    noise : Tensor (s,)
        Their true noise variances sigma_k^2.
    basis : Tensor (p, r)
    weights : Tensor (s,)
        Weights of the benign clients.
    responses : int
        q.
    """
    covariance = noise[:, None, None] * torch.linalg.inv(gram)
    inside = torch.einsum("pr,kpm,mr->k", basis, covariance, basis)
    outside = covariance.diagonal(dim1=1, dim2=2).sum(dim=1) - inside
    share = weights / weights.sum()
    return Terms(responses * float(inside.mean()), responses * float((share.square() * outside).sum()), 0.0, 0.0)


@dataclass(frozen=True)
class Pooled:
    """Result of refitting the benign clients together.

    ``coefficients`` (K, p, q) are refitted for benign clients and unchanged for the others. ``basis`` (p, r) spans the
    subspace. ``common`` (p, q) is the common part off the subspace, zero where none is found. ``spread`` is tau^2, the
    variance of a benign client's entries off the subspace.
    """

    coefficients: Tensor
    basis: Tensor
    common: Tensor
    spread: float


@dataclass(frozen=True)
class _Model:
    """Fitted model C + span(U).

    ``excess`` is its residual sum of squares less that of the clients' own fits, in units of their noise. ``freedom``
    is the expectation of ``excess`` where there is nothing but noise.
    """

    basis: Tensor
    common: Tensor
    excess: float
    freedom: int


def pool(fits: Fits, benign: Tensor, rank: int) -> Pooled:
    """Refit the benign clients together in Theta_k = C + U A_k + H_k, with H_k of variance tau^2 off the subspace.

    U, C and A_k are fitted by alternating least squares on all benign clients' data, starting from these clients'
    frame. C is dropped where that lowers Mallows' C_p, which charges two for each of the (p - r) q entries of C. The
    rank is searched from the given one: a direction is kept where it lowers the residuals by more than
    ``WORTH`` (p + s q), in units of the remaining residual variance (after Bunea, She, Wegkamp, arXiv:1004.2995). tau^2
    is estimated by the method of moments, from the excess of the residuals over the noise that each client's own fit
    shows. Each client's coefficients are then the best linear predictor

        argmin_B ||Y_k - X_k B||^2 / sigma_k^2 + ||P_perp (B - C)||^2 / tau^2.

    This is the client's own estimate where tau^2 is large, and lies in C + span(U) where tau^2 is zero.

    Parameters
    ----------
    fits : Fits
    benign : Tensor (K,), bool
    rank : int
        Start of the search for the rank: ``ClairResult.rank``.
    """
    own = Fits(*(value[benign] for value in (fits.estimates, fits.gram, fits.moments, fits.noise, fits.freedom)))
    model = _search(own, rank)
    scale = own.estimates.shape[2] * float(_visible(own, model.basis).sum())
    spread = max(0.0, (model.excess - model.freedom) / scale)
    coefficients = fits.estimates.clone()
    coefficients[benign] = predict(own, model.basis, model.common, spread)
    return Pooled(coefficients, model.basis, model.common, spread)


def _search(fits: Fits, rank: int) -> _Model:
    """Return the model of the best rank: search down from the given rank, and up from it if no direction is dropped."""
    s, p, q = fits.estimates.shape
    everyone = torch.ones(s, dtype=torch.bool)
    frame = fit_frame(fits.estimates, fits.weights / fits.weights.mean(), everyone, 0)
    largest = max(0, min(p - 1, (s - 1) * q - 1))  # one more would fit all differences exactly

    def worth(simple: _Model, rich: _Model) -> bool:
        level = max(1.0, rich.excess / rich.freedom)
        return simple.excess - rich.excess > WORTH * (p + s * q) * level

    start = min(rank, largest)
    model = _fitted(fits, frame, start)
    while model.basis.shape[1] > 0:
        lower = _fitted(fits, frame, model.basis.shape[1] - 1)
        if worth(lower, model):
            break
        model = lower
    while start <= model.basis.shape[1] < largest:
        higher = _fitted(fits, frame, model.basis.shape[1] + 1)
        if not worth(model, higher):
            break
        model = higher
    return model


def _fitted(fits: Fits, frame: Frame, rank: int) -> _Model:
    """Fit the model of a given rank, with or without a common part, whichever has the lower C_p."""
    s, p, q = fits.estimates.shape
    U, r = frame.eigenvectors[:, :rank], rank
    models = []
    for common, entries in ((project_out(U, frame.mean), (p - r) * q), (torch.zeros_like(frame.mean), 0)):
        basis, C = alternate(fits, U, common, keep_common=entries > 0)
        excess = excess_risk(fits, within(fits, basis, C))
        models.append(_Model(basis, C, excess, (p - r) * (s * q - r) - entries))
    return min(models, key=lambda model: model.excess - 2 * model.freedom)


def within(fits: Fits, U: Tensor, C: Tensor) -> Tensor:
    """Fit every client by least squares within C + span(U); return coefficients (K, p, q)."""
    return C + U @ torch.linalg.solve(U.T @ fits.gram @ U, U.T @ (fits.moments - fits.gram @ C))


def excess_risk(fits: Fits, coefficients: Tensor) -> float:
    """Return the residual sum of squares beyond that of the clients' own fits, in units of their noise variances."""
    D = fits.estimates - coefficients
    return float((fits.precision * (D * (fits.gram @ D)).sum(dim=(1, 2))).sum())


def _visible(fits: Fits, U: Tensor) -> Tensor:
    """Return tr G - tr (U'GU)^-1 U'G^2 U (K,), with G = X'X / sigma^2.

    This is the expected excess of a client whose entries off the subspace have variance one.
    """
    GU = fits.gram @ U
    taken = torch.linalg.solve(U.T @ GU, GU.mT @ GU).diagonal(dim1=1, dim2=2).sum(dim=1)
    return fits.precision * (fits.gram.diagonal(dim1=1, dim2=2).sum(dim=1) - taken)


def alternate(fits: Fits, U: Tensor, C: Tensor, *, keep_common: bool = True) -> tuple[Tensor, Tensor]:
    """Minimise the residual sum of squares over subspace and common part, from a close start.

    With A_k given, [U C] solves one least-squares problem with regressors [A_k; I]: normal equations in p (r + q)
    unknowns.
    """
    K, p, q = fits.moments.shape
    r = U.shape[1]
    for _ in range(ROUNDS):
        A = U.T @ (within(fits, U, C) - C)  # (K, r, q)
        Z = torch.cat([A, torch.eye(q, dtype=A.dtype).expand(K, q, q)], dim=1) if keep_common else A
        outer = (fits.precision[:, None, None] * Z @ Z.mT).flatten(1)  # (K, t*t)
        t = Z.shape[1]
        normal = (outer.T @ fits.gram.flatten(1)).reshape(t, t, p, p).permute(0, 2, 1, 3).reshape(t * p, t * p)
        right = torch.einsum("k,ktq,kpq->tp", fits.precision, Z, fits.moments).flatten()
        W = torch.linalg.solve(normal, right).reshape(t, p).T  # (p, t): U, and C beside it
        U = torch.linalg.qr(W[:, :r]).Q
        C = project_out(U, W[:, r:]) if keep_common else C
    return U, C


def predict(fits: Fits, U: Tensor, C: Tensor, spread: float) -> Tensor:
    """Return the best linear predictor (K, p, q) of the coefficients; ``spread``: variance off the subspace."""
    if spread == 0.0:
        return within(fits, U, C)
    outside = (torch.eye(len(U), dtype=U.dtype) - U @ U.T) / spread
    scale = fits.precision[:, None, None]
    return torch.linalg.solve(scale * fits.gram + outside, scale * fits.moments + outside @ C)


def spectral(fits: Fits, samples: Tensor, rank: int, share: float, strength: float = 0.5) -> Tensor:
    """Apply the spectral method of Tian, Gu, Feng (arXiv:2303.17765, their Algorithm 2) to one response (K, p, 1).

    The method is told the rank and the contaminated fraction ``share``. Where share > 0, every estimate is scaled to
    the (1 - share) quantile of the norms. The leading ``rank`` left singular vectors span the representation. Every
    client is refitted in it, which gives b~_k. Then b_k minimises ||y - X b||^2 / (2 n) + gamma / sqrt(n) ||b - b~_k||
    with gamma = strength sqrt(p + log K).
    """
    B = fits.estimates[:, :, 0].T  # (p, K)
    p, K = B.shape
    norms = B.norm(dim=0)
    scaled = B / norms * torch.quantile(norms, 1 - share) if share > 0 else B
    U = torch.linalg.svd(scaled, full_matrices=False).U[:, :rank]
    centre = within(fits, U, torch.zeros(p, 1, dtype=B.dtype))
    gamma = strength * (p + torch.log(torch.tensor(float(K)))).sqrt()
    return centre + torch.stack([
        _step(fits.gram[k] / n, (fits.moments[k] - fits.gram[k] @ centre[k])[:, 0] / n, float(gamma / n.sqrt()))
        for k, n in enumerate(samples.double())
    ])


def _step(G: Tensor, g: Tensor, penalty: float) -> Tensor:
    """Return argmin_d d'G d / 2 - g'd + penalty ||d|| (p, 1), that is, d = (G + penalty / ||d||)^-1 g.

    The length ||d|| is found by bisection.
    """
    if float(g.norm()) <= penalty:
        return torch.zeros_like(g)[:, None]
    values, vectors = torch.linalg.eigh(G)
    h = vectors.T @ g
    low, high = 0.0, float(g.norm() / values[0])
    for _ in range(60):
        length = (low + high) / 2
        # true where ||d|| is greater than ``length``
        low, high = (length, high) if float((h / (values * length + penalty)).norm()) > 1 else (low, length)
    return (vectors @ (h * high / (values * high + penalty)))[:, None]

