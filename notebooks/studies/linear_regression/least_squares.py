"""Linear regression: least-squares fits as client updates, and what their residuals add to CLAIR.

Client k has X_k (n_k, p) and Y_k (n_k, q) = X_k Theta_k + noise of variance sigma_k^2; its update is the least-squares
estimate, with covariance sigma_k^2 (X_k'X_k)^-1 in every column. The shared subspace is one of features: rows of Theta.
A regression, unlike an adapter, knows the noise of its own update, and clients that can be asked for X_k'X_k can be
refitted together. Both are used by ``pool`` after CLAIR has said who is benign. All of this file is ours but
``spectral``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import Frame, fit_frame
from clairlib.theory.refinement_gain import Terms

ROUNDS = 3  # of alternating least squares from a frame that is already close: a fourth changes nothing that is measured
WORTH = 3.0  # of a direction; the largest of the noise takes (p^.5 + (s q)^.5)^2 <= 2 (p + s q) and a little more
SINGULAR = 1e-10  # a diagonal entry of R below this part of the largest: dependent features


@dataclass(frozen=True)
class Fits:
    """Least-squares fits of K clients.

    ``estimates`` (K, p, q), ``gram`` X_k'X_k (K, p, p), ``moments`` X_k'Y_k (K, p, q), ``noise`` (K,) the residual
    variance, one for all q responses, ``freedom`` (K,) = (n_k - p) q.
    """

    estimates: Tensor
    gram: Tensor
    moments: Tensor
    noise: Tensor
    freedom: Tensor

    @property
    def weights(self) -> Tensor:
        """One over the mean variance of an entry of the estimate (K,): the weights of `CLAIR.fit`."""
        p = self.gram.shape[1]
        return p / (self.noise * torch.linalg.inv(self.gram).diagonal(dim1=1, dim2=2).sum(dim=1))

    @property
    def errors(self) -> Tensor:
        """Expected squared error of the estimates (K,): the noise of `CLAIR.fit`."""
        return self.estimates.shape[1] * self.estimates.shape[2] / self.weights

    @property
    def precision(self) -> Tensor:
        """Estimate of 1 / sigma_k^2 (K,), unbiased for Gaussian noise and more than two degrees of freedom."""
        return (1 - 2 / self.freedom).clamp(min=0.0) / self.noise


def least_squares(X: Sequence[Tensor], Y: Sequence[Tensor]) -> Fits:
    """Fit every client by itself; sample sizes may differ.

    Parameters
    ----------
    X : sequence of Tensor (n_k, p)
    Y : sequence of Tensor (n_k, q)

    Raises
    ------
    ValueError
        For a client with too few samples or with dependent features.
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
    """Expected error of refined least-squares estimates, told P and S, given the benign clients' designs. Exact.

    Statement 4 with the estimators' actual covariance sigma_k^2 (X_k'X_k)^-1 in the place of sigma^2 I, averaged with
    the weights w: inside q mean_k sigma_k^2 tr P (X_k'X_k)^-1, outside q sum_k w_k^2 sigma_k^2 tr P_perp (X_k'X_k)^-1 /
    (sum w)^2. No heterogeneity.

    Parameters
    ----------
    gram : Tensor (s, p, p), noise : Tensor (s,), weights : Tensor (s,)
        Of the benign clients; ``noise`` the true variances.
    basis : Tensor (p, r)
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
    """Clients refitted together: ``coefficients`` (K, p, q), those of clients that are not benign as they were.

    ``basis`` (p, r), ``common`` (p, q) off the subspace, zero where none is seen, ``spread`` tau^2, the variance of a
    benign client's entries off the subspace.
    """

    coefficients: Tensor
    basis: Tensor
    common: Tensor
    spread: float


@dataclass(frozen=True)
class _Model:
    """C + span(U), fitted: residuals in ``excess`` of the clients' own fits, and the mean of that for noise alone."""

    basis: Tensor
    common: Tensor
    excess: float
    freedom: int


def pool(fits: Fits, benign: Tensor, rank: int) -> Pooled:
    """Refit the benign clients together in the model Theta_k = C + U A_k + H_k, H_k of variance tau^2 off the subspace.

    U, C and A_k by alternating least squares on all benign clients' data, from their frame. C is dropped where that
    lowers Mallows' C_p: two for each of its (p - r) q entries. The rank is searched from the one given: a direction is
    kept where it takes more than ``WORTH`` (p + s q) from the residuals, in units of what is left of them (after
    Bunea, She, Wegkamp, arXiv:1004.2995). tau^2 is the excess of the residuals over the noise that each client's own
    fit shows (method of moments), and each client's coefficients are then the best linear predictor

        argmin_B ||Y_k - X_k B||^2 / sigma_k^2 + ||P_perp (B - C)||^2 / tau^2,

    its own estimate where tau^2 is large, and in C + span(U) where it is zero.

    Parameters
    ----------
    fits : Fits
    benign : Tensor (K,), bool
    rank : int
        Where the search for the rank starts: ``ClairResult.rank``.
    """
    own = Fits(*(value[benign] for value in (fits.estimates, fits.gram, fits.moments, fits.noise, fits.freedom)))
    model = _search(own, rank)
    scale = own.estimates.shape[2] * float(_visible(own, model.basis).sum())
    spread = max(0.0, (model.excess - model.freedom) / scale)
    coefficients = fits.estimates.clone()
    coefficients[benign] = _predict(own, model.basis, model.common, spread)
    return Pooled(coefficients, model.basis, model.common, spread)


def _search(fits: Fits, rank: int) -> _Model:
    """The model of the best rank, down from the one given, or up from it if none is dropped."""
    s, p, q = fits.estimates.shape
    everyone = torch.ones(s, dtype=torch.bool)
    frame = fit_frame(fits.estimates, fits.weights / fits.weights.mean(), everyone, 0)
    largest = max(0, min(p - 1, (s - 1) * q - 1))  # with one more, a direction for every difference

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
    """The model of a rank, with or without a common part."""
    s, p, q = fits.estimates.shape
    U, r = frame.eigenvectors[:, :rank], rank
    models = []
    for common, entries in ((project_out(U, frame.mean), (p - r) * q), (torch.zeros_like(frame.mean), 0)):
        basis, C = _alternate(fits, U, common, keep_common=entries > 0)
        excess = _excess(fits, within(fits, basis, C))
        models.append(_Model(basis, C, excess, (p - r) * (s * q - r) - entries))
    return min(models, key=lambda model: model.excess - 2 * model.freedom)


def within(fits: Fits, U: Tensor, C: Tensor) -> Tensor:
    """Every client's least squares within C + span(U) (K, p, q)."""
    return C + U @ torch.linalg.solve(U.T @ fits.gram @ U, U.T @ (fits.moments - fits.gram @ C))


def _excess(fits: Fits, coefficients: Tensor) -> float:
    """Residual sum of squares beyond that of the clients' own fits, in units of their noise."""
    D = fits.estimates - coefficients
    return float((fits.precision * (D * (fits.gram @ D)).sum(dim=(1, 2))).sum())


def _visible(fits: Fits, U: Tensor) -> Tensor:
    """tr G - tr (U'GU)^-1 U'G^2 U, G = X'X / sigma^2 (K,): what variance one off the subspace adds to the excess."""
    GU = fits.gram @ U
    taken = torch.linalg.solve(U.T @ GU, GU.mT @ GU).diagonal(dim1=1, dim2=2).sum(dim=1)
    return fits.precision * (fits.gram.diagonal(dim1=1, dim2=2).sum(dim=1) - taken)


def _alternate(fits: Fits, U: Tensor, C: Tensor, *, keep_common: bool = True) -> tuple[Tensor, Tensor]:
    """Subspace and common part of least residual sum of squares, from a start that is close.

    With A_k given, [U C] is one least-squares problem with regressors [A_k; I]: normal equations in p (r + q) unknowns.
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


def _predict(fits: Fits, U: Tensor, C: Tensor, spread: float) -> Tensor:
    """Best linear predictor (K, p, q) of the coefficients when those off the subspace have variance ``spread``."""
    if spread == 0.0:
        return within(fits, U, C)
    outside = (torch.eye(len(U), dtype=U.dtype) - U @ U.T) / spread
    scale = fits.precision[:, None, None]
    return torch.linalg.solve(scale * fits.gram + outside, scale * fits.moments + outside @ C)


def spectral(fits: Fits, samples: Tensor, rank: int, share: float, strength: float = 0.5) -> Tensor:
    """Spectral method of Tian, Gu, Feng (arXiv:2303.17765, their Algorithm 2), for one response (K, p, 1).

    Told the rank and the contaminated share. All estimates are scaled to the (1 - share) quantile of their norms, where
    share > 0; the leading ``rank`` left singular vectors span the representation; every client is refitted in it, to
    b~_k; then b_k minimises ||y - X b||^2 / (2 n) + gamma / sqrt(n) ||b - b~_k||, gamma = strength sqrt(p + log K).
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
    """argmin_d d'G d / 2 - g'd + penalty ||d|| (p, 1): d = (G + penalty / ||d||)^-1 g, its length by bisection."""
    if float(g.norm()) <= penalty:
        return torch.zeros_like(g)[:, None]
    values, vectors = torch.linalg.eigh(G)
    h = vectors.T @ g
    low, high = 0.0, float(g.norm() / values[0])
    for _ in range(60):
        length = (low + high) / 2
        # ||d|| > length where the step of that length is too short
        low, high = (length, high) if float((h / (values * length + penalty)).norm()) > 1 else (low, length)
    return (vectors @ (h * high / (values * high + penalty)))[:, None]

