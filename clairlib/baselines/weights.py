"""Robust means of clients whose weights depend on inner products alone: from a K x K Gram matrix to K weights.

Norms, distances and covariances of updates, and of their weighted means, are read off G_jk = <Theta_j, Theta_k>, which
for adapters comes from their factors. Weights are float64 (K,); the mean itself is `weighted_mean`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clairlib.linalg.low_rank import LowRank

Z_THRESHOLD = 3.0  # of the norm filter
CLIPPING_ROUNDS = 20
RESOLUTION = 1e-8  # distances below this part of the largest norm are rounding, since the Gram matrix holds squares


def gram_matrix(updates: Tensor | Sequence[LowRank]) -> Tensor:
    """Inner products <Theta_j, Theta_k> (K, K), float64, of a dense stack (K, p, q) or of adapters of any ranks.

    For adapters tr((B_j' B_k) (A_k A_j')); cost O((p + q) N^2), N = sum of ranks.
    """
    if isinstance(updates, Tensor):
        X = updates.double().flatten(1)
        return X @ X.T
    B = torch.cat([u.scale * u.B.double() for u in updates], dim=1)  # (p, N)
    A = torch.cat([u.A.double() for u in updates])  # (N, q)
    owner = torch.arange(len(updates), device=B.device).repeat_interleave(
        torch.tensor([u.rank for u in updates], device=B.device)
    )
    member = torch.nn.functional.one_hot(owner, len(updates)).to(B.dtype)  # (N, K)
    return member.T @ ((B.T @ B) * (A @ A.T)) @ member


def weighted_mean(updates: Tensor | Sequence[LowRank], weights: Tensor) -> Tensor | LowRank:
    """sum_k w_k Theta_k, of the kind of ``updates``, float64.

    For adapters the factors of all clients with w_k != 0 side by side, an adapter of the sum of their ranks: exact,
    where the mean of the factors is not the mean of the products.
    """
    if isinstance(updates, Tensor):
        return torch.einsum("k,kpq->pq", weights, updates.double())
    used = [(float(w), u) for w, u in zip(weights, updates, strict=True) if w != 0] or [(0.0, updates[0])]
    B = torch.cat([w * u.scale * u.B.double() for w, u in used], dim=1)
    return LowRank(B, torch.cat([u.A.double() for _, u in used]))


def geometric_median(updates: Tensor) -> Tensor:
    """The matrix (p, q) with the least sum of Frobenius distances to the updates (K, p, q); float64."""
    X = updates.double()
    centre = X.mean(dim=0)  # distances are read off squares: without the common part they are finer
    weights = geometric_median_weights(gram_matrix(X - centre))
    return centre + torch.einsum("k,kpq->pq", weights, X - centre)


def squared_distances(gram: Tensor) -> Tensor:
    """||Theta_j - Theta_k||_F^2 (K, K)."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0.0)


def distances_to(gram: Tensor, weights: Tensor) -> Tensor:
    """||Theta_k - sum_j w_j Theta_j||_F (K,)."""
    return (gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights).clamp(min=0.0).sqrt()


def mean_weights(gram: Tensor) -> Tensor:
    """The plain mean of everybody."""
    return torch.full_like(gram[0], 1 / len(gram))


def equal_weights(chosen: Tensor) -> Tensor:
    """The plain mean of the chosen clients (K,) bool."""
    return chosen.double() / chosen.sum()


def krum_scores(gram: Tensor, contaminated: int) -> Tensor:
    """Krum's score (K,): the sum of squared distances to the K - f - 2 nearest other clients, f = ``contaminated``.

    Blanchard, El Mhamdi, Guerraoui, Stainer (NeurIPS 2017), who suppose 2 f + 2 < K. Beyond that the score stays
    defined, without their guarantee; at least one neighbour is taken.
    """
    squared = squared_distances(gram).fill_diagonal_(torch.inf)
    neighbours = max(1, len(gram) - contaminated - 2)
    return squared.sort(dim=1).values[:, :neighbours].sum(dim=1)


def krum_weights(gram: Tensor, contaminated: int) -> Tensor:
    """Krum: the one client with the least score, the first of equal ones."""
    weights = torch.zeros_like(gram[0])
    weights[krum_scores(gram, contaminated).argmin()] = 1.0
    return weights


def multikrum_weights(gram: Tensor, contaminated: int) -> Tensor:
    """MultiKrum: the mean of the K - f clients with the least scores (Blanchard et al. leave their number open)."""
    kept = krum_scores(gram, contaminated).argsort(stable=True)[: len(gram) - contaminated]
    return equal_weights(torch.zeros_like(gram[0], dtype=torch.bool).index_fill(0, kept, True))


def geometric_median_weights(gram: Tensor, *, tolerance: float = 1e-10, max_iterations: int = 1000) -> Tensor:
    """Geometric median by Weiszfeld's iteration, w_k ~ 1 / ||Theta_k - sum_j w_j Theta_j||.

    Robust federated aggregation of Pillutla, Kakade, Harchaoui (IEEE TSP 2022). Distances are held above what the Gram
    matrix resolves, so that an iterate may stand on a client; stops when it moves by less than ``tolerance`` of the
    clients' mean distance.
    """
    weights = mean_weights(gram)
    smallest = RESOLUTION * gram.diagonal().max().sqrt()
    for _ in range(max_iterations):
        distances = distances_to(gram, weights)
        if smallest == 0 or distances.max() <= smallest:
            break
        inverse = 1 / distances.clamp(min=smallest)
        step = inverse / inverse.sum() - weights
        weights = weights + step
        if (step @ gram @ step).clamp(min=0.0).sqrt() <= tolerance * distances.mean():
            break
    return weights


def clipped_step(gram: Tensor, weights: Tensor, radius: float) -> Tensor:
    """One round of centred clipping: v + mean_k (Theta_k - v) min(1, radius / ||Theta_k - v||), v = sum_j w_j Theta_j.

    Karimireddy, He, Jaggi (ICML 2021).
    """
    shrink = (radius / distances_to(gram, weights)).clamp(max=1.0) / len(gram)
    return weights * (1 - shrink.sum()) + shrink


def centred_clipping_weights(gram: Tensor) -> Tensor:
    """Centred clipping from v = 0, ``CLIPPING_ROUNDS`` rounds, the radius in each the clients' median distance from v.

    The radius rule is ours (theirs needs the honest variance and the share of attackers): half the clients are clipped,
    and where the rounds end is Huber's estimate of location with that scale. Weights need not add up to one before.
    """
    weights = torch.zeros_like(gram[0])
    for _ in range(CLIPPING_ROUNDS):
        radius = float(distances_to(gram, weights).median())
        if radius == 0:
            break
        weights = clipped_step(gram, weights, radius)
    return weights


def norm_filter_weights(gram: Tensor) -> Tensor:
    """The mean of the clients whose norm lies within ``Z_THRESHOLD`` standard deviations (n - 1) of the mean norm.

    Cannot fire with fewer than 11 clients, as |z| <= (K - 1) / sqrt(K).
    """
    norms = gram.diagonal().sqrt()
    return equal_weights((norms - norms.mean()).abs() <= Z_THRESHOLD * norms.std())


def caf_weights(gram: Tensor, contaminated: int) -> Tensor:
    """Covariance-bound agnostic filter (Allouah, Guerraoui, Stephan, ICML 2025).

    Clients are weighed down by their squared part c_k (1 - t_k / max t) along the leading direction of the weighted
    covariance until the weights add up to K - 2 f; of all means on the way the one with the least leading variance.
    Past half, f is taken as the largest minority. The eigenvector is exact, not one power step from a random start.
    """
    K, f = len(gram), min(contaminated, (len(gram) - 1) // 2)
    c, least, best = torch.ones_like(gram[0]), torch.inf, mean_weights(gram)
    while c.sum() > K - 2 * f:
        weights = c / c.sum()
        cross = gram @ weights
        centred = gram - cross - cross[:, None] + weights @ cross  # <Theta_j - mean, Theta_k - mean>
        root = weights.sqrt()
        variances, vectors = torch.linalg.eigh(root[:, None] * centred * root)
        if variances[-1] < least:
            least, best = float(variances[-1]), weights
        along = (centred @ (root * vectors[:, -1])).square()  # squared parts along it, up to a factor
        if along.max() == 0:
            break
        c = c * (1 - along / along.max())
    return best


def nearest_neighbour_mixing(gram: Tensor, contaminated: int) -> Tensor:
    """Row k averages client k's K - f nearest clients, itself among them: a mixing matrix (K, K).

    NNM of Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan (AISTATS 2023), made before a robust rule.
    """
    kept = len(gram) - contaminated
    nearest = squared_distances(gram).argsort(dim=1, stable=True)[:, :kept]
    return torch.zeros_like(gram).scatter_(1, nearest, 1 / kept)
