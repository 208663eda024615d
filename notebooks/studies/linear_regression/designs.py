"""Clients of linear regression: two published designs, one design of this project, and data that statsmodels ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from statsmodels.datasets import fair, fertility
from torch import Generator, Tensor

from clairlib.core.seeds import derive
from clairlib.simulate.attacks import random_frame

KINDS = ("shuffled", "negated", "scaled", "features")  # ways to corrupt a client's real data on purpose
UNITS = 10.0  # factor on the responses of a client that reports in other units
COUPLES = 60  # least number of couples in a client, which is a pair of occupations
FIRST, YEARS, BLOCK = 1960, 52, 4  # years of the fertility rates; one year in each block of four is observed
DEGREES = 8  # number of polynomials, constant included, on which a country's rates are regressed
COUNTRIES = 60  # number of countries drawn from those without missing years
REGIONS = (
    "Latin America & Caribbean (all income levels)",
    "OECD members",
    "Other small states",
    "Pacific island small states",
)


@dataclass(frozen=True)
class Tasks:
    """Clients' data with the truth.

    ``X`` (n_k, p) and ``Y`` (n_k, q) of every client; ``targets`` (K, p, q); ``benign`` (K,) bool; ``rank`` r.
    """

    X: list[Tensor]
    Y: list[Tensor]
    targets: Tensor
    benign: Tensor
    rank: int

    @property
    def samples(self) -> Tensor:
        """Sample sizes n_k (K,)."""
        return torch.tensor([len(x) for x in self.X])


@dataclass(frozen=True)
class Split:
    """Real clients' data in two parts.

    ``X`` and ``Y`` are the part to fit, corrupted for clients that are not benign. ``held_X`` and ``held_Y`` are held
    out and clean. ``benign`` (K,) is bool.
    """

    X: list[Tensor]
    Y: list[Tensor]
    held_X: list[Tensor]
    held_Y: list[Tensor]
    benign: Tensor


def armul(share: float, off: float, seed: int) -> Tasks:
    """Draw the low-rank design of Duan and Wang (arXiv:2202.05250), number for number as their code does.

    There are 30 tasks with 200 samples, 50 standard normal features and noise variance 1. Benign coefficients have
    length 2 in the first three coordinates, plus a random step of length ``off``. Contaminated coefficients have length
    2 in a random direction. The published runs use seeds 10000, 11000, .., 109000 of numpy's legacy generator. Source:
    the code beside the paper (github.com/kw2934/ARMUL, experiment.py).
    """
    K, n, p, rank, length = 30, 200, 50, 3, 2.0
    draw = np.random.RandomState(seed)
    targets = np.zeros((K, p))
    for k in range(K):
        z = draw.randn(rank)
        targets[k, :rank] = length * z / np.linalg.norm(z)
    benign = np.ones(K, dtype=bool)
    benign[draw.choice(K, size=int(K * share), replace=False)] = False
    X, Y = [], []
    for k in range(K):
        step = draw.randn(p)
        step = step / np.linalg.norm(step)
        targets[k] = targets[k] + off * step if benign[k] else length * step
        x = draw.randn(n, p)
        X.append(torch.from_numpy(x))
        Y.append(torch.from_numpy(x @ targets[k] + draw.randn(n))[:, None])
    return Tasks(X, Y, torch.from_numpy(targets)[:, :, None], torch.from_numpy(benign), rank)


def armul_seed(run: int) -> int:
    """Return the published seed of a run 0 .. 99."""
    return 10000 + 1000 * run


def tian_gu_feng(n: int, p: int, r: int, share: float, *, K: int = 100, generator: Generator) -> Tasks:
    """Draw the contaminated design of Tian, Gu, Feng (arXiv:2303.17765), one representation for all benign tasks.

    Benign coefficients are U a with a uniform on (-2, 2)^r; features are standard normal and the noise variance is 1.
    Contaminated tasks have coefficients uniform on (-3, 3)^p and features of standard deviation 2. The design follows
    the code beside the paper (github.com/ytstat/RL-MTL-TL, generate_data.py); the random numbers are this project's.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    bad = torch.randperm(K, generator=generator)[: int(share * K)]
    benign = torch.ones(K, dtype=torch.bool)
    benign[bad] = False
    basis = random_frame(p, r, generator=generator)
    targets = basis @ (4 * torch.rand(K, r, 1, **options) - 2)
    targets[bad] = 6 * torch.rand(len(bad), p, 1, **options) - 3
    X = torch.randn(K, n, p, **options) * torch.where(benign, 1.0, 2.0)[:, None, None]
    Y = X @ targets + torch.randn(K, n, 1, **options)
    return Tasks(list(X), list(Y), targets, benign, r)


def responses(
    q: int, spread: float, correlation: float, share: float, *, noise: float = 0.5, generator: Generator
) -> Tasks:
    """Draw this project's multi-response design: 24 clients, p = 20, r = 3, targets M + U A_k.

    Sample sizes lie between 40 and 40 * ``spread``. Rows of A_k and the matrix M have expected squared norm 1. Features
    are normal with correlation ``correlation ** |i - j|``. Contaminated clients have coefficients of the same size in
    all directions. ``noise`` is the standard deviation of a response's noise.
    """
    K, p, r, fewest = 24, 20, 3, 40
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    basis = random_frame(p, r, generator=generator)
    A, M = torch.randn(K, r, q, **options) / q**0.5, torch.randn(p, q, **options) / (p * q) ** 0.5
    targets = M + basis @ A
    bad = torch.randperm(K, generator=generator)[: round(share * K)]
    targets[bad] = M + torch.randn(len(bad), p, q, **options) * (r / (p * q)) ** 0.5
    places = torch.arange(p, dtype=torch.float64)
    root = torch.linalg.cholesky(correlation ** (places[:, None] - places).abs())
    sizes = (fewest * spread ** torch.rand(K, **options)).round().int().tolist()
    X = [torch.randn(n, p, **options) @ root.T for n in sizes]
    Y = [x @ target + noise * torch.randn(len(x), q, **options) for x, target in zip(X, targets, strict=True)]
    benign = torch.ones(K, dtype=torch.bool)
    benign[bad] = False
    return Tasks(X, Y, targets, benign, r)


def couples(kind: str, share: float, seed: int) -> Split:
    """Split a survey of 6,366 married women; a client is a pair of occupations, hers and her husband's.

    A client has 60 or more couples: 20 to 60 to fit, the others held out. Features: constant, age, years married,
    children, religiousness and education, standardised over the whole survey. Responses: rating of the marriage, and
    log(1 + time in affairs). (Fair, J. Political Economy 1978; ``statsmodels.datasets.fair``.)
    """
    table = fair.load_pandas().data
    features = table[["age", "yrs_married", "children", "religious", "educ"]].to_numpy(dtype=float)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    X = np.column_stack([np.ones(len(features)), features])
    Y = np.column_stack([table.rate_marriage, np.log1p(table.affairs)])
    pairs = table[["occupation", "occupation_husb"]].to_numpy()
    _, group, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    rows = [torch.from_numpy(np.flatnonzero(group == g)) for g in np.flatnonzero(sizes >= COUPLES)]
    generator = derive(seed, "regression", "couples")
    fitted = []
    for own in rows:
        own = own[torch.randperm(len(own), generator=generator)]
        n = int(torch.randint(20, min(60, len(own) - 10) + 1, (), generator=generator))
        fitted.append((own[:n], own[n:]))
    return _split(torch.from_numpy(X), torch.from_numpy(Y), fitted, kind, share, seed)


def countries(kind: str, share: float, seed: int) -> Split:
    """Split births per woman, 1960 .. 2011; a client is a country, and 60 are drawn from the 188 without gaps.

    Features are orthogonal polynomials of the year up to degree 7. One year in each block of four is observed, drawn
    for each country; the other years are held out. (World Bank; ``statsmodels.datasets.fertility``.)
    """
    table = fertility.load_pandas().data
    table = table[~table["Country Name"].isin(REGIONS)]
    rates = table[[str(FIRST + t) for t in range(YEARS)]].astype(float).dropna().to_numpy()
    generator = derive(seed, "regression", "countries")
    chosen = torch.randperm(len(rates), generator=generator)[:COUNTRIES]
    Y = torch.from_numpy(rates)[chosen].reshape(-1, 1)  # (countries * years, 1)
    grid = np.linspace(-1, 1, YEARS)
    basis = torch.from_numpy(np.linalg.qr(np.polynomial.legendre.legvander(grid, DEGREES - 1)).Q * YEARS**0.5)
    starts, fitted = torch.arange(0, YEARS, BLOCK), []
    for k in range(COUNTRIES):
        seen = torch.zeros(YEARS, dtype=torch.bool)
        seen[starts + torch.randint(BLOCK, (len(starts),), generator=generator)] = True
        fitted.append((k * YEARS + seen.nonzero().flatten(), k * YEARS + (~seen).nonzero().flatten()))
    return _split(basis.repeat(COUNTRIES, 1), Y, fitted, kind, share, seed)


DATA_SETS = {"couples": couples, "countries": countries}


def _split(X: Tensor, Y: Tensor, rows: list[tuple[Tensor, Tensor]], kind: str, share: float, seed: int) -> Split:
    """Make clients from the rows to fit and the rows held out, and corrupt a fraction ``share`` of the clients."""
    generator = derive(seed, "regression", "corrupted")
    benign = torch.ones(len(rows), dtype=torch.bool)
    benign[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]] = False
    pairs = zip((i for i, _ in rows), benign, strict=True)
    seen = [(X[i], Y[i]) if ok else corrupt(kind, X[i], Y[i], generator) for i, ok in pairs]
    fit_X, fit_Y = (list(part) for part in zip(*seen, strict=True))
    return Split(fit_X, fit_Y, [X[j] for _, j in rows], [Y[j] for _, j in rows], benign)


def corrupt(kind: str, X: Tensor, Y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Corrupt a client's data: responses shuffled, negated or in other units, or all features but the first shuffled.

    Raises
    ------
    ValueError
        The kind is not in ``KINDS``.
    """
    if kind == "shuffled":
        return X, Y[torch.randperm(len(Y), generator=generator)]
    if kind == "negated":
        return X, -Y
    if kind == "scaled":
        return X, UNITS * Y
    if kind == "features":
        order = 1 + torch.randperm(X.shape[1] - 1, generator=generator)
        return torch.cat([X[:, :1], X[:, order]], dim=1), Y
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
