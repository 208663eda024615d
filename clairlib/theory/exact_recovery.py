"""Closed forms for exact recovery by the convex program, before the program is solved.

They are our own derivations (Statement 2a), not the paper's (arXiv:2605.21217). Proofs are in notebook 02.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.convex import NEGLIGIBLE, lambda_window

ROUNDING = 1e-13  # relative change at which `oracle_program` stops


def balanced_window(low_rank: Tensor, contamination: Tensor) -> tuple[float, float]:
    """Return the window of weights lam at which this decomposition is the optimum, for contamination off the subspace.

    With c_k = C_k / ||C_k||_F and G = sum_k c_k over the contaminated clients, and s the number of benign clients,

        low = max_{k in S} ||V_k||_F / sqrt(1 - ||G||_F^2 / s^2),   high = 1 / || [c_k, .., G / sqrt(s)] ||_2.

    Arguments are as for ``lambda_window``, with L_k = 0 for contaminated clients. low is inf where ||G||_F >= s. If no
    client is contaminated, or none is benign, the window is that of ``lambda_window``. If the contamination reaches
    into the subspace, both ends are approximate; use ``recovery_certificate`` then.

    Derivation. As sum_k Y_k = 0, the multipliers Y_k of the benign clients sum to -lam G. Take Y_k = U V_k' - lam G / s
    for k in S. With U'C_k = 0 all optimality conditions hold for low < lam < high: ||Y_k||_F^2 = ||V_k||_F^2 + lam^2
    ||G||_F^2 / s^2, and P_perp Y P_perp Y' = lam^2 (sum_k c_k c_k' + G G' / s). No choice has a smaller one (Jensen).
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
    """Bounds that tell whether the convex program recovers this subspace and this set exactly, at one weight lam.

    ``dual`` Y (K, p, q) is the candidate multiplier, ``spectral`` is ||P_perp Y||_2, and ``block`` is the largest
    ||Y_k||_F / lam of a benign client. If both are below 1, every optimum is exact. ``necessary`` bounds ``block`` of
    all multipliers from below. If it or ``spectral`` exceeds 1, none is.
    """

    dual: Tensor
    spectral: float
    block: float
    necessary: float

    def verdict(self, margin: float = 0.0) -> str:
        """Return "exact", "not exact" or "undecided"; the first two need bounds more than ``margin`` away from 1."""
        if max(self.spectral, self.block) < 1 - margin:
            return "exact"
        return "not exact" if max(self.spectral, self.necessary) > 1 + margin else "undecided"


def recovery_certificate(updates: Tensor, benign: Tensor, basis: Tensor, lam: float) -> RecoveryCertificate:
    """Check the optimality conditions of exact recovery, for noiseless updates with known benign clients and subspace.

    The program told U and S (``oracle_program``) fixes W_k = U'Y_k, and Z_k = P_perp Y_k for the contaminated clients.
    Z_k for the benign clients is free, under the linear conditions sum_k Z_k = 0 and sum_k Z_k W_k' = 0. The
    least-squares solution has the smallest ||Z||_2 of all, because it is any other solution times a projector, and the
    smallest sum_k ||Z_k||_F^2. Therefore spectral > 1 rules out every multiplier. So does a value above lam^2 of the
    benign clients' mean ||Y_k||_F^2 or of some benign ||W_k||_F^2.

    P_perp X_k of ``updates`` (K, p, q), float64, is the same for all ``benign`` (K,) bool. ``basis`` (p, r) is an
    orthonormal basis of the differences of benign clients.
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


def oracle_program(updates: Tensor, benign: Tensor, basis: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Solve the convex program told U and S, and return its multiplier as (W, Z).

    W_k = U'Y_k, (K, r, q). Z_k = P_perp Y_k for the contaminated clients and 0 on S, (K, p, q). D_k = P_perp (X_k -
    X_j), with any benign j, is known. What remains is to minimise || [B_1 .. B_K] ||_* + lam sum_{k not in S}
    sqrt(||T_k||_F^2 + ||D_k||_F^2) with B_k = U'X_k - N - T_k, over N and T_k. The terms are majorised by quadratics
    with weights (BB')^(-1/2) and 1 / sqrt(||T_k||_F^2 + ||D_k||_F^2); only r x r systems are solved.
    """
    coordinates, off = basis.T @ updates, project_out(basis, updates)
    D = torch.where(benign[:, None, None], 0.0, off - off[benign].mean(dim=0))
    T, N = torch.zeros_like(coordinates), coordinates[benign].mean(dim=0)
    eye = torch.eye(basis.shape[1], dtype=updates.dtype)
    kept = eye.repeat(len(updates), 1, 1)  # B_k = kept_k (U'X_k - N); kept_k = I for the benign
    for _ in range(500):
        inverse = _inverse_root(_wide(coordinates - N - T))
        sizes = _norms(T, D)[~benign, None, None]
        kept[~benign] = eye - torch.linalg.solve(inverse + lam / sizes * eye, inverse.expand(len(sizes), -1, -1))
        N = torch.linalg.solve(kept.sum(dim=0), (kept @ coordinates).sum(dim=0))
        previous, T = T, (eye - kept) @ (coordinates - N)
        if float((T - previous).norm()) <= ROUNDING * float(coordinates.norm()):
            break
    B = coordinates - N - T
    return _inverse_root(_wide(B)) @ B, lam * D / _norms(T, D)[:, None, None]


def certified_weight(updates: Tensor, benign: Tensor, basis: Tensor) -> float:
    """Find the weight where ``spectral`` = ``block``, the middle of the window; if both exceed 1, none is certified."""
    lam = 1 / math.sqrt(math.log(max(len(updates), 3)))
    for _ in range(6):
        proof = recovery_certificate(updates, benign, basis, lam)
        if proof.spectral == 0 or abs(math.log(proof.block / proof.spectral)) < 0.01:
            break
        lam *= math.sqrt(proof.block / proof.spectral)
    return lam


def _norms(T: Tensor, D: Tensor) -> Tensor:
    """Return the Frobenius norms (K,) of blocks with part T in the subspace and part D off it."""
    return (T.square().sum(dim=(1, 2)) + D.square().sum(dim=(1, 2))).clamp(min=torch.finfo(T.dtype).tiny).sqrt()


def _wide(blocks: Tensor) -> Tensor:
    """Place blocks (K, p, q) side by side: [X_1 .. X_K], (p, K*q)."""
    return blocks.permute(1, 0, 2).flatten(1)


def _inverse_root(wide: Tensor) -> Tensor:
    """Return (B B')^(-1/2) of B (r, n), which has full row rank."""
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    return (vectors / values.clamp(min=torch.finfo(wide.dtype).tiny).sqrt()) @ vectors.T
