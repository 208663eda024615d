"""Client scores that CLAIR is compared with: norms and distances of whole updates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clairlib.baselines.weights import geometric_median, gram_matrix, krum_scores


def norm_score(updates: Tensor) -> Tensor:
    """Return |z| of every client's norm (K,): | ||Theta_k||_F - mean | / standard deviation (n - 1), over all clients.

    Federated systems filter at |z| > 3, which fewer than 11 clients cannot reach. If all norms are equal, |z| is 0.
    """
    norms = torch.linalg.matrix_norm(updates.double())
    deviation = (norms - norms.mean()).abs()
    spread = norms.std()
    return deviation / spread if spread > 0 else torch.zeros_like(norms)


def krum_score(updates: Tensor, contaminated: int) -> Tensor:
    """Return Krum's scores (K,), told how many clients are contaminated, by `krum_scores`."""
    return krum_scores(gram_matrix(updates), contaminated)


def geometric_median_score(updates: Tensor) -> Tensor:
    """Return the distance ||Theta_k - geometric median||_F of every client (K,)."""
    return torch.linalg.matrix_norm(updates.double() - geometric_median(updates))


# The second argument is the number of contaminated clients, which only Krum uses.
CLIENT_SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "norm filter": lambda updates, contaminated: norm_score(updates),
    "Krum distance": krum_score,
    "geometric median distance": lambda updates, contaminated: geometric_median_score(updates),
}
