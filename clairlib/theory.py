"""Closed forms: what the mathematics promises before anything is solved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEGLIGIBLE = 1e-4  # relative size under which a singular value or a client's contamination counts as zero


def lambda_window(low_rank: Tensor, contamination: Tensor, *, rank: int | None = None) -> tuple[float, float]:
    """Interval of the weight lam in which the convex program can return this decomposition.

    low = max_{k in S} ||V_k||_F,   high = 1 / || [C_k / ||C_k||_F]_{k not in S} ||_2,

    where [L_1 .. L_K] = U diag(s) [V_1 .. V_K]' is the thin SVD (V_k is q x r), C_k is the contamination of
    client k and S the clients whose contamination is negligible (below 1e-4 of the largest).

    Derivation. Optimality of (M, L, C) asks for a multiplier Y with Y in the subdifferential of ||L||_*,
    Y_k = lam C_k / ||C_k||_F off S, ||Y_k||_F <= lam on S and sum_k Y_k = 0.
    The first gives U'Y_k = V_k', so lam >= ||Y_k||_F >= ||V_k||_F for every k: the low end.
    It also gives ||Y||_2 <= 1, hence lam || [C_k / ||C_k||_F]_{k not in S} ||_2 <= 1: the high end.

    Parameters
    ----------
    low_rank : Tensor (K, p, q)
        Blocks L_k, in the gauge of the optimum: mean zero over clients, the mean being part of M.
    contamination : Tensor (K, p, q)
        Blocks C_k; zero for benign clients.
    rank : int, optional
        Rank of [L_1 .. L_K]; by default the number of singular values above 1e-4 of the largest.

    Returns
    -------
    (low, high) : tuple of float
        Dimensionless. low is 0 when L = 0 or nobody is benign; high is inf when nobody is contaminated.

    Notes
    -----
    Both ends are necessary, not sufficient: sum_k Y_k = 0 is not used, and contamination that leans to one
    side (sum_k C_k / ||C_k||_F far from zero) pulls M aside, which costs L an extra direction. The window is
    this project's own derivation for its reconstruction of the program; it is not taken from the paper
    (arXiv:2605.21217).
    """
    count, p, q = low_rank.shape
    sizes = torch.linalg.vector_norm(contamination, dim=(1, 2))  # (K,)
    contaminated = sizes > NEGLIGIBLE * sizes.max()
    wide = low_rank.permute(1, 0, 2).reshape(p, -1)  # (p, K*q)
    _, values, vh = torch.linalg.svd(wide, full_matrices=False)
    r = int((values > NEGLIGIBLE * values[0]).sum()) if rank is None else rank
    leverage = torch.linalg.vector_norm(vh[:r].reshape(r, count, q), dim=(0, 2))  # ||V_k||_F, (K,)
    low = float(leverage[~contaminated].max()) if bool((~contaminated).any()) else 0.0
    if not bool(contaminated.any()):
        return low, math.inf
    directions = contamination[contaminated] / sizes[contaminated, None, None]
    stacked = directions.permute(1, 0, 2).reshape(p, -1)  # (p, K_bad*q)
    return low, 1.0 / float(torch.linalg.matrix_norm(stacked, ord=2))
