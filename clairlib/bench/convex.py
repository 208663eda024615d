"""Benchmark of the convex solver against an independent solver, side by side in one run."""

from __future__ import annotations

import statistics
import time
from functools import partial
from types import ModuleType
from typing import Any

from torch import Generator, Tensor

from clairlib.recovery.convex import decompose
from clairlib.simulate import planted

SIZES = ((30, 12, 5), (20, 12, 4), (12, 10, 3), (8, 8, 6), (16, 6, 1))  # (p, K, q)
SAME_OBJECTIVE = 1e-6  # relative distance to the reference optimum that both solvers must reach
EPSILONS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)  # SCS's eps; the loosest that reaches SAME_OBJECTIVE is timed


def convex(*, instances: int = 20, repeats: int = 3, generator: Generator) -> list[dict[str, Any]]:
    """Time our convex solver and cvxpy + SCS on the same objective; one row per instance.

    The instances are small and planted, alternately noiseless (nu = 0) and noisy. Both solvers reach the optimum to
    relative 1e-6, SCS at the loosest accuracy that does. The optimum is that of our solver with gap 1e-9. Timed runs
    alternate, and the best of ``repeats`` counts. cvxpy's compilation is done before and is not timed. torch runs on
    one thread; set OMP_NUM_THREADS=1 so that SCS does, too.

    Returns
    -------
    list of dict
        ``p, K, q, nu, lam, optimum``; ``iterations``, ``ours_seconds``, ``ours_error``; ``cvxpy_seconds`` (all of
        ``problem.solve``), ``scs_seconds`` (SCS's set-up and solve), ``scs_error``, ``scs_eps``; ``speed`` =
        cvxpy_seconds / ours_seconds, ``speed_solver`` = scs_seconds / ours_seconds. Errors are relative to the optimum.

    Raises
    ------
    ModuleNotFoundError
        cvxpy is not installed.
    """
    try:
        import cvxpy
    except ModuleNotFoundError as error:
        message = "the convex benchmark needs cvxpy: pip install 'clairlib[test]'"
        raise ModuleNotFoundError(message, name="cvxpy") from error
    from clairlib.bench.training import one_thread

    with one_thread():
        return [_row(cvxpy, index, repeats, generator) for index in range(instances)]


def speed_ratio(rows: list[dict[str, Any]], key: str = "speed") -> float:
    """Return the median over the rows of ``speed`` or ``speed_solver``: how many times faster our solver was."""
    return statistics.median(row[key] for row in rows)


def _row(cvxpy: ModuleType, index: int, repeats: int, generator: Generator) -> dict[str, Any]:
    p, K, q = SIZES[index % len(SIZES)]
    nu, sigma = (0.3, 0.05) if index % 2 else (0.0, 0.0)
    updates = planted(K=K, p=p, q=q, r=2, noise_std=sigma, generator=generator).updates
    reference = decompose(updates, nu=nu, tolerance=1e-9)
    optimum, lam = reference.certificate.primal, reference.lam
    problem = convex_problem(cvxpy, updates, lam, nu)
    solve = partial(problem.solve, solver=cvxpy.SCS, max_iters=100_000, warm_start=False)
    enough = (eps for eps in EPSILONS if abs(solve(eps=eps) - optimum) <= SAME_OBJECTIVE * optimum)
    if (eps := next(enough, None)) is None:
        aim = f"come within {SAME_OBJECTIVE} of the objective {optimum}"
        raise RuntimeError(f"SCS did not {aim} even at eps {EPSILONS[-1]}")
    ours, theirs, inside = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        found = decompose(updates, lam=lam, nu=nu)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        value = solve(eps=eps)
        theirs.append(time.perf_counter() - start)
        inside.append(problem.solver_stats.solve_time + problem.solver_stats.setup_time)
    return {
        "p": p, "K": K, "q": q, "nu": nu, "lam": lam, "optimum": optimum,
        "iterations": found.certificate.iterations, "ours_seconds": min(ours),
        "ours_error": abs(found.certificate.primal - optimum) / optimum, "cvxpy_seconds": min(theirs),
        "scs_seconds": min(inside), "scs_error": abs(value - optimum) / optimum, "scs_eps": eps,
        "speed": min(theirs) / min(ours), "speed_solver": min(inside) / min(ours),
    }  # fmt: skip


def convex_problem(cvxpy: ModuleType, updates: Tensor, lam: float, nu: float, common: bool = True) -> Any:
    """Build the program of `clairlib.recovery.convex`, without ``common`` without its M, for updates (K, p, q)."""
    K, p, q = updates.shape
    M = cvxpy.Variable((p, q)) if common else cvxpy.Constant([[0.0] * q] * p)
    L, S = cvxpy.Variable((p, K * q)), cvxpy.Variable((p, K * q))
    X = updates.permute(1, 0, 2).reshape(p, K * q).double().cpu().numpy()
    rest = X - cvxpy.hstack([M] * K) - L - S
    value = cvxpy.normNuc(L)
    for k in range(K):
        value += lam * cvxpy.norm(S[:, k * q : (k + 1) * q], "fro")
    if nu > 0:
        return cvxpy.Problem(cvxpy.Minimize(value + cvxpy.sum_squares(rest) / (2 * nu)))
    return cvxpy.Problem(cvxpy.Minimize(value), [rest == 0])
