"""The convex program: common part + low-rank part + contamination of few clients, with a certificate.

    minimise  || [L_1 .. L_K] ||_* + lam sum_k ||S_k||_F + 1/(2 nu) sum_k ||Z_k||_F^2
    subject to  X_k = M + L_k + S_k + Z_k                                  (nu = 0: Z = 0)

It is this project's reconstruction from the abstract of arXiv:2605.21217, not an equation of the paper. Dual:

    maximise  sum_k <Y_k, X_k> - nu/2 sum_k ||Y_k||_F^2
    subject to  ||[Y_1 .. Y_K]||_2 <= 1,  ||Y_k||_F <= lam,  sum_k Y_k = 0,

It bounds the optimum from below, so a feasible pair proves how far it is from optimal. The iteration and the
bounds are in `clairlib.recovery.admm`; as there, private functions hold blocks as (p, K, q).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clairlib.recovery.admm import (
    Iterate,
    Problem,
    dual_scale,
    iterates,
    objective,
    quick_gap,
    relative_gap,
    shrink_blocks,
)

NEGLIGIBLE = 1e-4  # relative size under which a singular value or a client's contamination counts as zero

ROUNDING = 1e-14  # updates that differ by less than this, relative to their size, are identical


@dataclass(frozen=True)
class Certificate:
    """How far a decomposition can be from the optimum: dual <= optimum <= primal.

    Both bounds are values at its tensors. ``relative_gap`` = (primal - dual) / primal, 0 when the objective
    is 0; ``converged`` says whether it is within the tolerance asked for. A contaminated client far larger
    than the others inflates the objective that the gap is relative to; ask for a smaller tolerance then.
    """

    primal: float
    dual: float
    relative_gap: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Decomposition:
    """X_k = M + L_k + S_k (+ residual when nu > 0), float64 on the device of the input.

    ``common_part`` M (p, q); ``low_rank`` L, ``contamination`` S and the dual variable ``dual`` Y, each (K, p, q).
    L has zero mean over clients; P M may be moved between M and L, so M alone is identified only off the
    subspace.
    """

    common_part: Tensor
    low_rank: Tensor
    contamination: Tensor
    dual: Tensor
    lam: float
    nu: float
    certificate: Certificate

    @property
    def contaminated(self) -> Tensor:
        """(K,) bool: clients with S_k != 0. Block shrinkage makes the others exactly zero."""
        return (self.contamination != 0).flatten(1).any(1)


@dataclass(frozen=True)
class _Solution:
    common_part: Tensor
    low_rank: Tensor
    contamination: Tensor
    dual: Tensor
    certificate: Certificate


def decompose(
    updates: Tensor,
    *,
    lam: float | None = None,
    nu: float = 0.0,
    with_common: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 5000,
) -> Decomposition:
    """Split client updates into a common, a low-rank and a block-sparse part by the convex program.

    Parameters
    ----------
    updates : Tensor (K, p, q)
        One update a client, finite, any floating dtype and device; solved in float64 on that device.
    lam : float, optional
        Weight of the contamination, dimensionless, 0 < lam <= inf. lam = inf is averaging and PCA (S = 0).
        For lam <= 1/sqrt(K) the nuclear constraint of the dual never binds, ||Y||_2^2 <= sum_k ||Y_k||_F^2 <=
        K lam^2 <= 1, so L = 0 is optimal and M is the geometric median of matrices (Huberised for nu > 0).
        None: started at 1/sqrt(log K) and moved to the geometric mean of the window that
        `lambda_window` reads off the solution, at most three times. With p = q = 20, r = 3, K
        = 30, that finds it at 60 % unstructured contamination, not at 80 %, nor with 40 % colluding: give lam
        there.
    nu : float
        Weight of the residual, in units of the updates: nu = 0 asks for an exact split. Singular values of L
        are shrunk by nu and blocks of S by lam nu, so noise of standard deviation sigma an entry stays out of
        both when nu >= sigma (sqrt(p) + sqrt(K q)) and lam nu is well above sigma sqrt(p q).
    with_common : bool
        False leaves M out (and sum_k Y_k = 0 of the dual): Outlier Pursuit in blocks (Xu, Caramanis, Sanghavi
        2012).
    tolerance : float
        Relative duality gap at which to stop.
    max_iterations : int
        After these the best point so far is returned with ``certificate.converged`` False.

    Returns
    -------
    Decomposition
        Scaling all updates (and nu) scales it, permuting clients permutes it, rotating either side rotates
        it. The optimum need not be unique; only its objective is certified.

    Raises
    ------
    ValueError
        If updates is not a non-empty (K, p, q) tensor, or lam, nu or max_iterations is out of range.
    """
    _check(updates, lam, nu, max_iterations)
    blocks = updates.detach().to(torch.float64).permute(1, 0, 2).contiguous()  # (p, K, q)
    origin = blocks.mean(1, keepdim=True) if with_common else torch.zeros_like(blocks[:, :1])
    centred = blocks - origin
    if float(centred.norm()) <= ROUNDING * float(blocks.norm()):
        centred = torch.zeros_like(centred)
    scale = float(torch.linalg.matrix_norm(centred.flatten(1), ord=2)) or 1.0
    problem = Problem(centred / scale, lam or _first_weight(blocks.shape[1]), nu / scale, with_common)
    if lam is None:
        problem = _centre_in_window(problem, max_iterations)
    found = _solve(problem, tolerance, max_iterations)
    bounds = found.certificate
    return Decomposition(
        common_part=(origin + scale * found.common_part)[:, 0],
        low_rank=scale * found.low_rank.permute(1, 0, 2),
        contamination=scale * found.contamination.permute(1, 0, 2),
        dual=found.dual.permute(1, 0, 2),
        lam=problem.lam,
        nu=nu,
        certificate=replace(bounds, primal=scale * bounds.primal, dual=scale * bounds.dual),
    )


def _check(updates: Tensor, lam: float | None, nu: float, max_iterations: int) -> None:
    if updates.ndim != 3 or updates.numel() == 0:
        raise ValueError(f"updates must be a non-empty (K, p, q) tensor, got shape {tuple(updates.shape)}")
    if lam is not None and not lam > 0:
        raise ValueError(f"lam must be positive (inf allowed), got {lam}")
    if not 0 <= nu < math.inf:
        raise ValueError(f"nu must be finite and not negative, got {nu}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")


def _first_weight(clients: int) -> float:
    return 1 / math.sqrt(math.log(max(clients, 3)))


def _centre_in_window(problem: Problem, max_iterations: int) -> Problem:
    """Move lam to the geometric mean of the window seen in a loose solution, at most three times.

    1 stands for an infinite high end (nobody contaminated): the least that the end can be with a single
    contaminated client, so that a lone one would still be seen. With nobody benign, or L = 0, lam is below
    the window: it moves half way (geometrically) to 1.
    """
    for _ in range(3):
        for iterate in itertools.islice(iterates(problem), max_iterations):
            if quick_gap(problem, iterate) <= 1e-3:
                break
        low_rank, contamination = iterate.low_rank.permute(1, 0, 2), iterate.contamination.permute(1, 0, 2)
        low, high = lambda_window(low_rank, contamination)
        if low == 0:
            low, high = problem.lam, 1.0
        elif math.isinf(high):
            high = 1.0
        if low >= high:
            break
        previous, problem = problem.lam, replace(problem, lam=math.sqrt(low * high))
        if abs(math.log(problem.lam / previous)) < 0.05:
            break
    return problem


def _solve(problem: Problem, tolerance: float, max_iterations: int) -> _Solution:
    """Iterate until the exact certificate holds; the quick one, which is free, says when to look."""
    best = _without_contamination(problem)
    if best.certificate.relative_gap <= tolerance:
        return _stamp(best, 0, tolerance)
    for step, iterate in enumerate(iterates(problem), start=1):
        last = step >= max_iterations
        if last or quick_gap(problem, iterate) <= tolerance:
            found = _given_contamination(problem, iterate.contamination, iterate.dual)
            if last:
                rest = _given_low_rank(problem, iterate)
                best = min(best, found, rest, key=lambda s: s.certificate.relative_gap)
                return _stamp(best, step, tolerance)
            if found.certificate.relative_gap <= tolerance:
                return _stamp(found, step, tolerance)
    raise AssertionError("unreachable: the iterates never end")


def _stamp(solution: _Solution, iterations: int, tolerance: float) -> _Solution:
    bounds = solution.certificate
    converged = bounds.relative_gap <= tolerance
    return replace(solution, certificate=replace(bounds, iterations=iterations, converged=converged))


def _certify(
    problem: Problem, common_part: Tensor, low_rank: Tensor, contamination: Tensor, dual: Tensor
) -> _Solution:
    """Bounds recomputed from the tensors by singular values, with the dual made exactly admissible."""
    spectral = float(torch.linalg.matrix_norm(dual.flatten(1), ord=2))
    dual = dual / max(1.0, spectral)
    t, lower = dual_scale(problem, dual)
    residual = problem.data - common_part - low_rank - contamination
    nuclear = torch.linalg.svdvals(low_rank.flatten(1)).sum()
    upper = objective(problem, nuclear, contamination, residual)
    certificate = Certificate(upper, lower, relative_gap(upper, lower), 0, False)
    return _Solution(common_part, low_rank, contamination, t * dual, certificate)


def _given_contamination(problem: Problem, contamination: Tensor, dual: Tensor | None) -> _Solution:
    """The best (M, L) for a given S; feasible, and S keeps its exact zeros."""
    rest = problem.data - contamination
    common_part = problem.centre(rest)
    rest = rest - common_part
    if problem.nu == 0 and dual is not None:
        return _certify(problem, common_part, rest, contamination, dual)
    U, values, Vh = torch.linalg.svd(rest.flatten(1), full_matrices=False)
    low_rank = (U * (values - problem.nu).clamp(min=0)) @ Vh if problem.nu > 0 else rest
    if dual is None:  # the multiplier of the program with this S fixed
        values = torch.where(values > 1e-12 * values[0], values, 0.0)
        weights = (values / problem.nu).clamp(max=1) if problem.nu > 0 else (values > 0).double()
        dual = ((U * weights) @ Vh).reshape(rest.shape)
    return _certify(problem, common_part, low_rank.reshape(rest.shape), contamination, dual)


def _without_contamination(problem: Problem) -> _Solution:
    """S = 0: averaging and PCA. Optimal when its multiplier has ||Y_k||_F <= lam for everybody."""
    return _given_contamination(problem, torch.zeros_like(problem.data), None)


def _given_low_rank(problem: Problem, iterate: Iterate) -> _Solution:
    """The best S for a given (M, L)."""
    rest = problem.data - iterate.common_part - iterate.low_rank
    contamination = shrink_blocks(rest, problem.lam * problem.nu)
    return _certify(problem, iterate.common_part, iterate.low_rank, contamination, iterate.dual)


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
