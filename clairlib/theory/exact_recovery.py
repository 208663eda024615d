"""Closed forms: what the mathematics promises before anything is solved.

This project's own derivations for its reconstruction of the program (Statement 2a), not the paper's
(arXiv:2605.21217); proofs in notebook 02.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.convex import NEGLIGIBLE, lambda_window

ROUNDING = 1e-13  # relative change at which ``told_program`` stops


def balanced_window(low_rank: Tensor, contamination: Tensor) -> tuple[float, float]:
    """Weights lam at which this decomposition is the optimum, where contamination lies off the subspace.

    With c_k = C_k / ||C_k||_F and G = sum_k c_k over the contaminated clients, s of them benign,

    low = max_{k in S} ||V_k||_F / sqrt(1 - ||G||_F^2 / s^2),   high = 1 / || [c_k, .., G / sqrt(s)] ||_2.

    Derivation. sum_k Y_k = 0 asks the benign clients to carry -lam G between them. Y_k = U V_k' - lam G / s does for
    k in S, and with U'C_k = 0 it satisfies every optimality condition when low < lam < high: ||Y_k||_F^2 = ||V_k||_F^2
    + lam^2 ||G||_F^2 / s^2, and P_perp Y P_perp Y' = lam^2 (sum_k c_k c_k' + G G' / s), other than which no choice
    is smaller (Jensen). Contamination that leans to one side (large G) closes the window. With nobody
    contaminated or nobody benign the ends are those of ``lambda_window``.

    Parameters
    ----------
    low_rank, contamination : Tensor (K, p, q)
        As for ``lambda_window``; L_k = 0 for contaminated clients.

    Returns
    -------
    (low, high) : tuple of float
        low is inf where ||G||_F >= s. Where contamination reaches into the subspace the ends are approximate; ask
        ``recovery_certificate`` then.
    """
    low, high = lambda_window(low_rank, contamination)
    sizes = torch.linalg.matrix_norm(contamination)
    contaminated = sizes > NEGLIGIBLE * sizes.max()
    s = int((~contaminated).sum())
    if math.isinf(high) or s == 0:
        return low, high
    directions = contamination[contaminated] / sizes[contaminated, None, None]
    lean = directions.sum(dim=0)
    spread = 1 - float(lean.norm() / s) ** 2
    stacked = torch.cat([*directions, lean / math.sqrt(s)], dim=1)  # (p, (K_bad + 1) * q)
    return (low / math.sqrt(spread) if spread > 0 else math.inf), 1 / float(torch.linalg.matrix_norm(stacked, ord=2))


@dataclass(frozen=True)
class RecoveryCertificate:
    """Does the convex program recover this subspace and this set exactly, at this weight and without noise?

    ``dual`` Y (K, p, q) is the candidate multiplier. ``spectral`` = ||P_perp Y||_2 and ``block`` = max over the benign
    of ||Y_k||_F / lam: both below 1 prove that every optimum is exact. ``necessary``, a lower bound of ``block`` over
    all multipliers, or ``spectral`` above 1 prove that none is.
    """

    dual: Tensor
    spectral: float
    block: float
    necessary: float

    def verdict(self, margin: float = 0.0) -> str:
        """"exact", "not exact" or "undecided", each end kept ``margin`` away from."""
        if max(self.spectral, self.block) < 1 - margin:
            return "exact"
        return "not exact" if max(self.spectral, self.necessary) > 1 + margin else "undecided"


def recovery_certificate(updates: Tensor, benign: Tensor, basis: Tensor, lam: float) -> RecoveryCertificate:
    """Optimality conditions of exact recovery, for noiseless updates whose benign clients and subspace are known.

    The program told U and S (``oracle_program``) fixes W_k = U'Y_k and, for the contaminated, Z_k = P_perp Y_k. What is
    left to choose is Z_k for the benign, under sum_k Z_k = 0 and sum_k Z_k W_k' = 0, linear conditions. The least
    squares solution has the smallest ||Z||_2 of all (it is the others times a projector) and the smallest
    sum_k ||Z_k||_F^2: so spectral > 1 rules every multiplier out, and so does the mean of the benign ||Y_k||_F^2 or
    some ||W_k||_F^2 above lam^2.

    Parameters
    ----------
    updates : Tensor (K, p, q)
        float64, without noise: P_perp X_k is the same for all benign k.
    benign : Tensor (K,) bool
    basis : Tensor (p, r)
        Orthonormal, spanned by the differences of benign clients.
    lam : float
    """
    K, p, q = updates.shape
    W, Z = oracle_program(updates, benign, basis, lam)
    conditions = torch.cat([torch.eye(q, dtype=W.dtype).expand(K, q, q), W], dim=1)  # (K, q + r, q)
    inside, outside = _wide(conditions[benign]), _wide(conditions[~benign])
    owed = _wide(Z[~benign]) @ outside.T  # (p, q + r)
    Z[benign] = -(owed @ torch.linalg.pinv(inside @ inside.T) @ inside).reshape(p, -1, q).permute(1, 0, 2)
    along, across = W[benign].square().sum(dim=(1, 2)), Z[benign].square().sum(dim=(1, 2))
    spectral = float(torch.linalg.matrix_norm(_wide(Z), ord=2))
    necessary = max(float(along.max()), float((along + across).mean())) ** 0.5 / lam
    return RecoveryCertificate(basis @ W + Z, spectral, float((along + across).max()) ** 0.5 / lam, necessary)


def oracle_program(
    updates: Tensor, benign: Tensor, basis: Tensor, lam: float, *, iterations: int = 500
) -> tuple[Tensor, Tensor]:
    """Multiplier of the convex program told U and S: W_k = U'Y_k (K, r, q), and Z_k = P_perp Y_k off S, 0 on S.

    Told them, contamination off the subspace is known, D_k = P_perp (X_k - X_j) with any benign j, and what remains is
    min || [B_1 .. B_K] ||_* + lam sum_{k not in S} sqrt(||T_k||_F^2 + ||D_k||_F^2) over B_k = U'X_k - N - T_k.
    Majorised by quadratics, weights (BB')^(-1/2) and 1 / ||S_k||_F, solved in turn; r x r algebra only.
    """
    coordinates, off = basis.T @ updates, project_out(basis, updates)
    D = torch.where(benign[:, None, None], 0.0, off - off[benign].mean(dim=0))
    T, N = torch.zeros_like(coordinates), coordinates[benign].mean(dim=0)
    eye = torch.eye(basis.shape[1], dtype=updates.dtype)
    kept = eye.repeat(len(updates), 1, 1)  # B_k = kept_k (U'X_k - N); all of it for the benign
    for _ in range(iterations):
        inverse = _inverse_root(_wide(coordinates - N - T))
        sizes = _norms(T, D)[~benign, None, None]
        kept[~benign] = eye - torch.linalg.solve(inverse + lam / sizes * eye, inverse.expand(len(sizes), -1, -1))
        N = torch.linalg.solve(kept.sum(dim=0), (kept @ coordinates).sum(dim=0))
        previous, T = T, (eye - kept) @ (coordinates - N)
        if float((T - previous).norm()) <= ROUNDING * float(coordinates.norm()):
            break
    B = coordinates - N - T
    return _inverse_root(_wide(B)) @ B, lam * D / _norms(T, D)[:, None, None]


def certified_weight(updates: Tensor, benign: Tensor, basis: Tensor, *, rounds: int = 6) -> float:
    """The weight at which ``spectral`` = ``block`` of the recovery certificate: the middle of its window.

    ``spectral`` grows about like lam and ``block`` falls like 1 / lam. Where both exceed 1 there no weight is
    certified.
    """
    lam = 1 / math.sqrt(math.log(max(len(updates), 3)))
    for _ in range(rounds):
        proof = recovery_certificate(updates, benign, basis, lam)
        if proof.spectral == 0 or abs(math.log(proof.block / proof.spectral)) < 0.01:
            break
        lam *= math.sqrt(proof.block / proof.spectral)
    return lam


def _norms(T: Tensor, D: Tensor) -> Tensor:
    """Frobenius norms (K,) of blocks with parts T in the subspace and D off it."""
    return (T.square().sum(dim=(1, 2)) + D.square().sum(dim=(1, 2))).clamp(min=torch.finfo(T.dtype).tiny).sqrt()


def _wide(blocks: Tensor) -> Tensor:
    """[X_1 .. X_K], (p, K*q), of blocks (K, p, q)."""
    return blocks.permute(1, 0, 2).flatten(1)


def _inverse_root(wide: Tensor) -> Tensor:
    """(B B')^(-1/2) of B (r, n), of full row rank."""
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    return (vectors / values.clamp(min=torch.finfo(wide.dtype).tiny).sqrt()) @ vectors.T
