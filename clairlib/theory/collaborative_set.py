"""Statement 3 (our derivation, notebook 04): at which distance a detector told P, M and sigma finds the exact set."""

from functools import lru_cache
from math import log, sqrt

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out
from clairlib.recovery.detection import FAMILY_ERROR
from clairlib.recovery.scores import filtered_energy

NULL_DRAWS = 200_000  # draws for the null quantile of the filtered energy, which has no closed form


def energy_separation(rows: int, columns: int, clients: int, error: float = FAMILY_ERROR) -> float:
    """Return the off-subspace distance over sigma at which the energy finds the exact set with probability 1 - error.

    This is Statement 3: sqrt(2 x) + 2 sqrt(x + sqrt(n x)) with n = rows * columns degrees of freedom and x =
    log(clients / error). Every contaminated client must be at least this far off.
    """
    n, x = rows * columns, log(clients / error)
    return sqrt(2 * x) + 2 * sqrt(x + sqrt(n * x))


def filtered_separation(rows: int, columns: int, directions: int, clients: int, error: float = FAMILY_ERROR) -> float:
    """Return the distance ||Delta||_(g) / sigma at which the filtered energy finds the exact set as surely.

    The filtered energy of a residual is the part in its g = ``directions`` leading singular directions. Let a >= b be
    the sides of the residual, x = log(clients / error), and c = min(sqrt(g) (sqrt(a) + sqrt(b)), sqrt(a b)), which
    bounds the mean norm of the noise. The distance is the smaller of c + 2 sqrt(2 x) and

        sqrt(2 x) + sqrt(c^2 - a g + 2 c sqrt(2 x) + 2 sqrt(a g x) + 4 x).
    """
    a, b = max(rows, columns), min(rows, columns)
    g, x = min(directions, b), log(clients / error)
    c, t = min(sqrt(g) * (sqrt(a) + sqrt(b)), sqrt(a * b)), sqrt(2 * x)
    return min(c + 2 * t, t + sqrt(c * c - a * g + 2 * c * t + 2 * sqrt(a * g * x) + 4 * x))


@lru_cache
def filtered_null(rows: int, columns: int, rank: int) -> np.ndarray:
    """Return an ascending sample of the filtered energy of standard normal noise (rows, columns).

    Its singular values are those of Bartlett's triangle: with a the larger side, the diagonal holds roots of chi^2
    variables with a - i degrees of freedom, i = 0, 1, .., and the entries above are standard normal.
    """
    a, b = max(rows, columns), min(rows, columns)
    draw = np.random.default_rng(derive(0, "filtered null", rows, columns, rank).initial_seed())
    triangle = np.triu(draw.standard_normal((NULL_DRAWS, b, b)), 1)
    triangle[:, range(b), range(b)] = np.sqrt(draw.chisquare(a - np.arange(b), (NULL_DRAWS, b)))
    return np.sort(filtered_energy(torch.from_numpy(triangle), rank).numpy())


def oracle_benign(
    updates: Tensor, basis: Tensor, common_part: Tensor, noise: float, statistic: str = "energy"
) -> Tensor:
    """Return the benign clients (K,) by the detector of Statement 3, which is told P, M and sigma, here ``noise``.

    Each client is tested at level FAMILY_ERROR / K. "energy" tests ||P_perp (X_k - M)||_F^2 / sigma^2, chi^2 under the
    null, "filtered" its part in the top 2 r directions, as in CLAIR's score of clients whose noise is alike.
    """
    K, p, q = updates.shape
    R, rows, level = project_out(basis, updates - common_part) / noise, p - basis.shape[1], FAMILY_ERROR / K
    if statistic == "energy":
        return R.square().sum(dim=(1, 2)) <= stats.chi2.isf(level, rows * q)
    null = filtered_null(rows, q, basis.shape[1])
    return filtered_energy(R, basis.shape[1]) <= np.quantile(null, 1 - level)
