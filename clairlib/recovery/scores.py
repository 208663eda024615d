"""Log scores: how much more structure a client leaves off the subspace than the noise of its own update explains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import squared_singular_values
from clairlib.recovery.leave_one_out import LeaveOneOut

# A contaminated client differs by r directions of its own and by its common part, so 2 r directions are scored.
SCORED_DIRECTIONS_PER_RANK = 2
SCORED_PART = 0.3  # largest part of the noise's columns that is scored; the bulk is the rest
LEVEL_REACH = 1.3  # log of the largest factor between levels of noise that honest clients are granted
LEVEL_QUANTILES = (0.1, 0.4)  # quantiles of the clients' levels of noise from which their variance is estimated
LAW_DRAWS = 400  # draws of pure noise from which the moments of the scores are computed
LEAST_VARIANCE = 1e-4  # least variance of a log score


@dataclass(frozen=True)
class NoiseLaw:
    """Moments of pure noise: the ``part`` of its energy in the top singular directions, and variances of logarithms.

    ``top`` and ``bulk`` are the variances of the logarithms of the energies in these and in the other directions,
    ``both`` is their covariance.
    """

    part: float
    top: float
    bulk: float
    both: float


@cache
def noise_law(rows: int, columns: int, directions: int) -> NoiseLaw:
    """Return the moments of Gaussian noise (rows, columns) split at its top ``directions``, from ``LAW_DRAWS`` draws.

    The singular values are those of a bidiagonal matrix of chi variables (Dumitriu and Edelman 2002).
    """
    p, q = max(rows, columns), min(rows, columns)
    if directions >= q:
        return NoiseLaw(1.0, 2.0 / (p * q), 0.0, 0.0)
    generator = np.random.default_rng(derive(0, "noise law", p, q).initial_seed())
    main = np.sqrt(generator.chisquare(p - np.arange(q), size=(LAW_DRAWS, q)))
    beside = np.sqrt(generator.chisquare(q - 1 - np.arange(q - 1), size=(LAW_DRAWS, q - 1)))
    J = torch.diag_embed(torch.as_tensor(main)) + torch.diag_embed(torch.as_tensor(beside), offset=1)
    squares = squared_singular_values(J)
    top, bulk = squares[:, :directions].sum(dim=1), squares[:, directions:].sum(dim=1)
    C = torch.cov(torch.stack([top.log(), bulk.log()]))
    return NoiseLaw(float((top / (top + bulk)).mean()), float(C[0, 0]), float(C[1, 1]), float(C[0, 1]))


def log_scores(left_out: LeaveOneOut) -> tuple[Tensor, float]:
    """Return the log scores (K,), and the variance of a log score under pure noise.

    With T_k the log energy of a client's leave-one-out residual in its top directions, divided by 1 + leverage, and B_k
    the log energy in the others, its bulk, the score is

        x_k = T_k - rho clip(B_k - median B, +-LEVEL_REACH),   rho = (tau^2 + c) / (tau^2 + v_B).

    tau^2 is the variance between clients of the log level of noise, from the spread of B over all clients beyond that
    of noise, and rho is the slope of the best linear prediction of a client's noise in its top directions from its bulk
    (c and v_B are the moments of `noise_law`). Alike clients have tau = 0, and energies count; where they differ,
    only the shape of a residual counts, within a factor exp(LEVEL_REACH) of the median level. All clients estimate the
    spread (`level_variance`), so no selected set confirms itself.
    """
    frame, (T, B, law) = left_out.frame, scored_energies(left_out)
    if law.bulk == 0:
        return T, max(law.top, LEAST_VARIANCE)
    between = max(0.0, level_variance(B) - law.bulk)
    rho = min(1.0, (between + max(law.both, 0.0)) / (between + law.bulk))
    x = T - rho * (B - B[frame.members].median()).clamp(-LEVEL_REACH, LEVEL_REACH)
    variance = law.top + rho**2 * law.bulk - 2 * rho * law.both + (1 - rho) ** 2 * between
    return x, max(variance, LEAST_VARIANCE)


def scored_energies(left_out: LeaveOneOut) -> tuple[Tensor, Tensor, NoiseLaw]:
    """Return the log energies T and B (K,) in the scored directions and in the bulk, and their `NoiseLaw`."""
    squares, members = left_out.squares, left_out.frame.members
    dof = max(left_out.benign.degrees_of_freedom(squares[members]), 1.0)
    rows, columns = noise_shape(squares[members], dof)
    m = max(1, min(SCORED_DIRECTIONS_PER_RANK * left_out.frame.rank, int(SCORED_PART * columns)))
    law = noise_law(rows, columns, m)
    top = squares[:, :m].sum(dim=1) / (1 + left_out.leverage / (columns * law.part))
    T, B = (energy.clamp(min=left_out.floor).log() for energy in (top, squares[:, m:].sum(dim=1)))
    return T, B, law


def filtered_energy(R: Tensor, rank: int) -> Tensor:
    """Return residuals' energy (K,) in the top ``SCORED_DIRECTIONS_PER_RANK * rank`` directions, a matched filter."""
    return squared_singular_values(R)[:, : max(SCORED_DIRECTIONS_PER_RANK * rank, 1)].sum(dim=1)


def level_variance(B: Tensor) -> float:
    """Return the variance between clients of the log energies B (K,), from the lower part of their distribution.

    It is that of a normal distribution with the same distance between two low quantiles. Contaminated clients raise
    their energy, so they hardly move these quantiles; where honest clients differ, the lower part shows it as well.
    """
    low, high = torch.quantile(B, B.new_tensor(LEVEL_QUANTILES)).tolist()
    width = stats.norm.ppf(LEVEL_QUANTILES[1]) - stats.norm.ppf(LEVEL_QUANTILES[0])
    return float(((high - low) / width) ** 2)


def noise_shape(squares: Tensor, dof: float) -> tuple[int, int]:
    """Return effective rows and columns, of product ``dof``, of the noise behind squared singular values (n, m).

    Of one matrix of noise, tr C^2 / (tr C)^2 is 1 / rows + 1 / columns, here in the median client.
    """
    trace = squares.sum(dim=1).clamp(min=torch.finfo(squares.dtype).tiny)
    total = float((squares / trace[:, None]).square().sum(dim=1).median()) * dof  # rows + columns
    columns = total / 2 - max(total**2 / 4 - dof, 0.0) ** 0.5
    columns = max(1, round(min(columns, float(squares.shape[1]))))
    return max(1, round(dof / columns)), columns
