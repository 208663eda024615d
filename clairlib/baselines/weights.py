"""Client weights of robust means that depend on inner products alone: from a K x K Gram matrix to K weights.

The Gram matrix G_jk = <Theta_j, Theta_k> gives norms, distances and covariances of updates and of their weighted means.
Weights are float64 (K,); `weighted_mean` computes the mean itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clairlib.linalg.low_rank import LowRank

Z_THRESHOLD = 3.0  # threshold of the norm filter
CLIPPING_ROUNDS = 20
RESOLUTION = 1e-8  # relative to the largest norm; smaller distances are rounding, as the Gram matrix holds squares


def gram_matrix(updates: Tensor | Sequence[LowRank]) -> Tensor:
    """Compute the inner products <Theta_j, Theta_k> (K, K) in float64.

    ``updates`` is a dense stack (K, p, q) or adapters of any ranks. For adapters an entry is tr((B_j' B_k) (A_k A_j')),
    at a total cost of O((p + q) N^2) with N the sum of the ranks.
    """
    if isinstance(updates, Tensor):
        X = updates.double().flatten(1)
        return X @ X.T
    B = torch.cat([u.scale * u.B.double() for u in updates], dim=1)  # (p, N)
    A = torch.cat([u.A.double() for u in updates])  # (N, q)
    ranks = torch.tensor([u.rank for u in updates], device=B.device)
    owner = torch.arange(len(updates), device=B.device).repeat_interleave(ranks)
    member = torch.nn.functional.one_hot(owner, len(updates)).to(B.dtype)  # (N, K)
    return member.T @ ((B.T @ B) * (A @ A.T)) @ member


def weighted_mean(updates: Tensor | Sequence[LowRank], weights: Tensor) -> Tensor | LowRank:
    """Compute sum_k w_k Theta_k in float64: dense for dense updates, an adapter for adapters.

    The adapter has the factors of all clients with w_k != 0 side by side, so its rank is the sum of their ranks.
    """
    if isinstance(updates, Tensor):
        return torch.einsum("k,kpq->pq", weights, updates.double())
    used = [(float(w), u) for w, u in zip(weights, updates, strict=True) if w != 0] or [(0.0, updates[0])]
    B = torch.cat([w * u.scale * u.B.double() for w, u in used], dim=1)
    return LowRank(B, torch.cat([u.A.double() for _, u in used]))


def geometric_median(updates: Tensor) -> Tensor:
    """Return the matrix (p, q) with the least sum of Frobenius distances to the updates (K, p, q); float64."""
    X = updates.double()
    centre = X.mean(dim=0)  # distances come from squares, which are more precise once the mean is removed
    weights = geometric_median_weights(gram_matrix(X - centre))
    return centre + torch.einsum("k,kpq->pq", weights, X - centre)


def squared_distances(gram: Tensor) -> Tensor:
    """Return the squared distances ||Theta_j - Theta_k||_F^2 (K, K)."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0.0)


def distances_to(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the distances ||Theta_k - sum_j w_j Theta_j||_F (K,)."""
    return (gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights).clamp(min=0.0).sqrt()


def mean_weights(gram: Tensor) -> Tensor:
    """Return the weights of the plain mean of all clients, 1 / K each."""
    return torch.full_like(gram[0], 1 / len(gram))


def equal_weights(chosen: Tensor) -> Tensor:
    """Return the weights of the plain mean of the chosen clients (K,) bool."""
    return chosen.double() / chosen.sum()


def krum_scores(gram: Tensor, contaminated: int) -> Tensor:
    """Return Krum's scores (K,): sums of squared distances to the K - f - 2 nearest other clients.

    f is ``contaminated``. Source: Blanchard, El Mhamdi, Guerraoui, Stainer (NeurIPS 2017), who assume 2 f + 2 < K.
    Beyond that at least one neighbour is used, without their guarantee.
    """
    squared = squared_distances(gram).fill_diagonal_(torch.inf)
    neighbours = max(1, len(gram) - contaminated - 2)
    return squared.sort(dim=1).values[:, :neighbours].sum(dim=1)


def krum_weights(gram: Tensor, contaminated: int) -> Tensor:
    """Krum: all weight on the client with the least score, the first of equal ones."""
    weights = torch.zeros_like(gram[0])
    weights[krum_scores(gram, contaminated).argmin()] = 1.0
    return weights


def multikrum_weights(gram: Tensor, contaminated: int) -> Tensor:
    """MultiKrum: equal weights on the K - f clients with the least scores; Blanchard et al. leave their number open."""
    kept = krum_scores(gram, contaminated).argsort(stable=True)[: len(gram) - contaminated]
    return equal_weights(torch.zeros_like(gram[0], dtype=torch.bool).index_fill(0, kept, True))


def geometric_median_weights(gram: Tensor) -> Tensor:
    """Weights of the geometric median by Weiszfeld's iteration, w_k ~ 1 / ||Theta_k - sum_j w_j Theta_j||.

    This is the robust federated aggregation of Pillutla, Kakade, Harchaoui (IEEE TSP 2022). Distances are kept above
    the resolution of the Gram matrix, so an iterate may coincide with a client. The iteration stops when it moves by
    less than 1e-10 times the mean distance of the clients.
    """
    weights = mean_weights(gram)
    smallest = RESOLUTION * gram.diagonal().max().sqrt()
    for _ in range(1000):
        distances = distances_to(gram, weights)
        if smallest == 0 or distances.max() <= smallest:
            break
        inverse = 1 / distances.clamp(min=smallest)
        step = inverse / inverse.sum() - weights
        weights = weights + step
        if (step @ gram @ step).clamp(min=0.0).sqrt() <= 1e-10 * distances.mean():
            break
    return weights


def centred_clipping_weights(gram: Tensor) -> Tensor:
    """Centred clipping (Karimireddy, He, Jaggi, ICML 2021) from v = 0 in ``CLIPPING_ROUNDS`` rounds.

    A round moves v to v + mean_k (Theta_k - v) min(1, radius / ||Theta_k - v||). The radius is the clients' median
    distance from v, which clips half of them. This rule is ours, as the source's needs the honest variance and the
    fraction of attackers. The limit is Huber's estimate of location with that scale; before it, the weights need not
    sum to one.
    """
    weights = torch.zeros_like(gram[0])
    for _ in range(CLIPPING_ROUNDS):
        distances = distances_to(gram, weights)
        radius = float(distances.median())
        if radius == 0:
            break
        shrink = (radius / distances).clamp(max=1.0) / len(gram)
        weights = weights * (1 - shrink.sum()) + shrink
    return weights


def norm_filter_weights(gram: Tensor) -> Tensor:
    """Equal weights on the clients whose norm is within ``Z_THRESHOLD`` standard deviations (n - 1) of the mean norm.

    Among fewer than 11 clients the filter cannot remove any, as |z| <= (K - 1) / sqrt(K).
    """
    norms = gram.diagonal().sqrt()
    return equal_weights((norms - norms.mean()).abs() <= Z_THRESHOLD * norms.std())


def caf_weights(gram: Tensor, contaminated: int) -> Tensor:
    """Covariance-bound agnostic filter (Allouah, Guerraoui, Stephan, ICML 2025).

    Each round multiplies a client's weight c_k by 1 - t_k / max t, where t_k is its squared component along the leading
    direction of the weighted covariance. The rounds end when the weights sum to at most K - 2 f, with f at most the
    largest minority. The result is the mean with the least leading variance among all rounds. The eigenvector is exact;
    the source takes one power step from a random start.
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
        along = (centred @ (root * vectors[:, -1])).square()  # squared components along the leading direction, scaled
        if along.max() == 0:
            break
        c = c * (1 - along / along.max())
    return best


def nearest_neighbour_mixing(gram: Tensor, contaminated: int) -> Tensor:
    """Return the mixing matrix (K, K) whose row k averages the K - f clients nearest to client k, itself included.

    This is NNM of Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan (AISTATS 2023), applied before a robust rule.
    """
    kept = len(gram) - contaminated
    nearest = squared_distances(gram).argsort(dim=1, stable=True)[:, :kept]
    return torch.zeros_like(gram).scatter_(1, nearest, 1 / kept)
