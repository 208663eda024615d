"""The convex program: common part + low-rank part + contamination of a few clients, with a certificate.

    minimise  || [L_1 .. L_K] ||_* + lam sum_k ||S_k||_F + 1/(2 nu) sum_k ||Z_k||_F^2
    subject to  X_k = M + L_k + S_k + Z_k                                  (nu = 0: Z = 0)

Its dual bounds the optimum from below, so a feasible pair proves how far it is from optimal:

    maximise  sum_k <Y_k, X_k> - nu/2 sum_k ||Y_k||_F^2
    subject to  ||[Y_1 .. Y_K]||_2 <= 1,  ||Y_k||_F <= lam,  sum_k Y_k = 0.

The program is this project's reconstruction from the abstract of arXiv:2605.21217, not an equation of the paper. The
iteration and the bounds are in `clairlib.recovery.admm`; as there, private functions hold blocks as (p, K, q).
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clairlib.recovery.admm import Problem, dual_scale, iterates, objective, quick_gap, relative_gap, shrink_blocks

NEGLIGIBLE = 1e-4  # relative size below which a singular value or a client's contamination counts as zero
ROUNDING = 1e-14  # updates that differ by less than this, relative to their size, are identical


@dataclass(frozen=True)
class Certificate:
    """Bounds on the optimum of the convex program: dual <= optimum <= primal, objective values at the decomposition.

    ``relative_gap`` is (primal - dual) / primal, 0 if the objective is 0; ``converged`` says whether it is within the
    tolerance. A contaminated client far larger than the others inflates the objective; then request a smaller one.
    """

    primal: float
    dual: float
    relative_gap: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Decomposition:
    """X_k = M + L_k + S_k (+ residual if nu > 0), float64 on the device of the input.

    ``common_part`` M (p, q); ``low_rank`` L, ``contamination`` S and the dual variable ``dual`` Y, each (K, p, q). L
    has zero mean over clients. M is identified only off the subspace.
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
        """(K,) bool: clients with S_k != 0. Block shrinkage makes S_k of the other clients exactly zero."""
        return (self.contamination != 0).flatten(1).any(1)


def decompose(
    updates: Tensor, *, lam: float | None = None, nu: float = 0.0, with_common: bool = True, tolerance: float = 1e-6,
    max_iterations: int = 5000,
) -> Decomposition:
    """Split client updates into a common part, a low-rank part and a block-sparse part by the convex program.

    The result scales, is permuted and rotated with the updates. Only the objective is certified, not uniqueness.

    Parameters
    ----------
    updates : Tensor (K, p, q)
        One update per client, finite, of any floating dtype and device; solved in float64 on that device.
    lam : float, optional
        Weight of the contamination, dimensionless, 0 < lam <= inf. lam = inf is averaging and PCA (S = 0). For lam <=
        1/sqrt(K) the constraint ||Y||_2 <= 1 of the dual never binds, because ||Y||_2^2 <= sum_k ||Y_k||_F^2 <= K lam^2
        <= 1. Then L = 0 is optimal and M is the geometric median of matrices (Huberised for nu > 0). If None, lam
        starts at 1/sqrt(log K) and moves, at most three times, to the geometric mean of the window that `lambda_window`
        reads off the solution. For p = q = 20, r = 3, K = 30 this finds the window at 60 % unstructured contamination,
        but not at 80 %, and not with 40 % colluding clients. Give lam in such cases.
    nu : float
        Weight of the residual, in units of the updates; nu = 0 asks for an exact split. Singular values of L are shrunk
        by nu and blocks of S by lam nu. Noise of standard deviation sigma per entry therefore stays out of L and S if
        nu >= sigma (sqrt(p) + sqrt(K q)) and lam nu is well above sigma sqrt(p q).
    with_common : bool
        False leaves out M, and sum_k Y_k = 0 in the dual: Outlier Pursuit in blocks (Xu, Caramanis, Sanghavi 2012).
    tolerance, max_iterations : float, int
        Relative duality gap and number of iterations at which to stop. At the latter the best point so far is returned,
        with ``certificate.converged`` False unless its gap is within ``tolerance``.

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
    first = lam or 1 / math.sqrt(math.log(max(blocks.shape[1], 3)))
    problem = Problem(centred / scale, first, nu / scale, with_common)
    if lam is None:
        problem = _centre_in_window(problem, max_iterations)
    found, iterations = _solve(problem, tolerance, max_iterations)
    primal, dual, gap = scale * found.certificate.primal, scale * found.certificate.dual, found.certificate.relative_gap
    return Decomposition(
        common_part=(origin + scale * found.common_part)[:, 0],
        low_rank=scale * found.low_rank.permute(1, 0, 2),
        contamination=scale * found.contamination.permute(1, 0, 2),
        dual=found.dual.permute(1, 0, 2),
        lam=problem.lam,
        nu=nu,
        certificate=Certificate(primal, dual, gap, iterations, gap <= tolerance),
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


def _centre_in_window(problem: Problem, max_iterations: int) -> Problem:
    """Move lam to the geometric mean of the window of a loose solution, at most three times."""
    for _ in range(3):
        for iterate in itertools.islice(iterates(problem), max_iterations):
            if quick_gap(problem, iterate) <= 1e-3:
                break
        low_rank, contamination = iterate.low_rank.permute(1, 0, 2), iterate.contamination.permute(1, 0, 2)
        low, high = lambda_window(low_rank, contamination)
        if low == 0:  # no client is benign, or L = 0: lam is below the window
            low, high = problem.lam, 1.0
        elif math.isinf(high):  # no client is contaminated: 1 is the smallest end that a single one can have
            high = 1.0
        if low >= high:
            break
        previous, problem = problem.lam, replace(problem, lam=math.sqrt(low * high))
        if abs(math.log(problem.lam / previous)) < 0.05:
            break
    return problem


def _solve(problem: Problem, tolerance: float, max_iterations: int) -> tuple[Decomposition, int]:
    """Iterate until the exact certificate is within the tolerance; the cheap gap says when to compute it."""
    # S = 0: averaging and PCA, optimal if the multiplier has all ||Y_k||_F <= lam
    best = _given_contamination(problem, torch.zeros_like(problem.data), None)
    if best.certificate.relative_gap <= tolerance:
        return best, 0
    for step, iterate in enumerate(iterates(problem), start=1):
        last = step >= max_iterations
        if last or quick_gap(problem, iterate) <= tolerance:
            found = _given_contamination(problem, iterate.contamination, iterate.dual)
            if last:
                common_part, low_rank = iterate.common_part, iterate.low_rank
                contamination = shrink_blocks(problem.data - common_part - low_rank, problem.lam * problem.nu)
                other = _certify(problem, common_part, low_rank, contamination, iterate.dual)
                return min(best, found, other, key=lambda s: s.certificate.relative_gap), step
            if found.certificate.relative_gap <= tolerance:
                return found, step
    raise AssertionError("unreachable: the iterates never end")


def _certify(problem: Problem, common_part: Tensor, low_rank: Tensor, sparse: Tensor, dual: Tensor) -> Decomposition:
    """Recompute the bounds from the tensors by singular values; the dual variable is scaled to be exactly feasible."""
    dual = dual / max(1.0, float(torch.linalg.matrix_norm(dual.flatten(1), ord=2)))
    t, lower = dual_scale(problem, dual)
    nuclear = torch.linalg.svdvals(low_rank.flatten(1)).sum()
    upper = objective(problem, nuclear, sparse, problem.data - common_part - low_rank - sparse)
    bounds = Certificate(upper, lower, relative_gap(upper, lower), 0, False)
    return Decomposition(common_part, low_rank, sparse, t * dual, problem.lam, problem.nu, bounds)


def _given_contamination(problem: Problem, contamination: Tensor, dual: Tensor | None) -> Decomposition:
    """Return the best (M, L) for a given S. The result is feasible, and S keeps its exact zeros."""
    rest = problem.data - contamination
    common_part = problem.centre(rest)
    rest = rest - common_part
    if problem.nu == 0 and dual is not None:
        return _certify(problem, common_part, rest, contamination, dual)
    U, values, Vh = torch.linalg.svd(rest.flatten(1), full_matrices=False)
    low_rank = (U * (values - problem.nu).clamp(min=0)) @ Vh if problem.nu > 0 else rest
    if dual is None:  # use the multiplier of the program with this S fixed
        values = torch.where(values > 1e-12 * values[0], values, 0.0)
        weights = (values / problem.nu).clamp(max=1) if problem.nu > 0 else (values > 0).double()
        dual = ((U * weights) @ Vh).reshape(rest.shape)
    return _certify(problem, common_part, low_rank.reshape(rest.shape), contamination, dual)


def lambda_window(low_rank: Tensor, contamination: Tensor, *, rank: int | None = None) -> tuple[float, float]:
    """Return the interval of lam in which the convex program can return this decomposition.

        low = max_{k in S} ||V_k||_F,   high = 1 / || [C_k / ||C_k||_F]_{k not in S} ||_2,

    where [L_1 .. L_K] = U diag(s) [V_1 .. V_K]' is the thin SVD (V_k is q x r), C_k is the contamination of client k
    and S is the set of clients whose contamination is negligible (at most 1e-4 of the largest).

    Derivation. If (M, L, C) is optimal, there is a multiplier Y in the subdifferential of ||L||_* with Y_k = lam C_k /
    ||C_k||_F off S, ||Y_k||_F <= lam on S and sum_k Y_k = 0. Being a subgradient gives U'Y_k = V_k', so lam >=
    ||Y_k||_F >= ||V_k||_F on S: the low end. It also gives ||Y||_2 <= 1: the high end.

    Both ends are necessary, not sufficient: sum_k Y_k = 0 is not used. Contamination that leans to one side (sum_k C_k
    / ||C_k||_F far from zero) pulls M aside, which costs L an extra direction. This is our derivation, not the paper's.

    ``low_rank`` holds the L_k (K, p, q), of mean zero over clients because the mean is part of M, ``contamination`` the
    C_k. ``rank`` is that of [L_1 .. L_K], by default the number of singular values above 1e-4 of the largest. low is 0
    if L = 0 or no client is benign; high is inf if no client is contaminated.
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
