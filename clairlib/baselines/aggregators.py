"""Aggregation rules that CLAIR is compared with, in one registry.

A rule combines the clients' products B A unless it says that it takes their factors. Rules that work by inner products
return adapters for adapters. Entrywise rules return dense matrices, as an entrywise median of adapters has full rank;
they multiply adapters out in blocks of rows, so the number of entries in memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clairlib.baselines import weights as cw
from clairlib.baselines.robust_pca import robust_pca
from clairlib.baselines.weights import geometric_median, geometric_median_weights, gram_matrix, weighted_mean
from clairlib.linalg.low_rank import LowRank, cores_of_factors
from clairlib.linalg.subspace import project_out
from clairlib.recovery.inputs import read_modules

Update = Tensor | LowRank
Updates = Tensor | list[LowRank]  # dense stack (K, p, q), or adapters

BLOCK_ENTRIES = 2**24  # most entries of all clients that an entrywise rule holds at a time: 128 MB in float64
TOLD = {"number contaminated": "contaminated", "benign set": "benign", "rank": "rank"}  # argument of `aggregate`


@dataclass(frozen=True)
class Facts:
    """What a rule may use besides the updates of one module.

    ``gram`` (K, K) holds the inner products of whole clients, summed over all modules. The caller tells the others, as
    in `aggregate`.
    """

    gram: Tensor
    contaminated: int = 0
    benign: Tensor | None = None
    rank: int = 0


Combine = Callable[[Updates, Facts], Any]


@dataclass(frozen=True)
class Aggregator:
    """An aggregation rule.

    ``combine`` returns one update for all clients or, if ``personal``, one per client. ``told`` names the fact that the
    caller must tell the rule: a key of ``TOLD``, or "" for none.
    """

    name: str
    source: str
    combine: Combine
    personal: bool = False
    told: str = ""


def aggregate(
    name: str, updates: Any, *, contaminated: int | None = None, benign: Tensor | None = None, rank: int | None = None
) -> Any:
    """Aggregate by the rule ``name``, a key of ``AGGREGATORS``, and return one update for each of the K clients.

    Parameters
    ----------
    updates : (K, p, q) array, sequence of LowRank with any ranks, or dict of them by module
        With several modules, weights and neighbours are computed for whole clients. Robust PCA and Subspace-Median
        treat every module separately.
    contaminated, benign, rank : int, Tensor (K,) bool, int
        Number of contaminated clients, benign clients, and rank of the shared subspace, for rules that must be told.
        Other rules do not see them.

    Returns
    -------
    list of K Tensor or LowRank
        The same update K times unless the rule is personal. A dict of such lists by module if ``updates`` is a dict.

    Raises
    ------
    ValueError, TypeError
        The rule is unknown or is not told what it needs, or the updates are malformed, or dense where it takes factors.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}; known: {', '.join(AGGREGATORS)}")
    rule = AGGREGATORS[name]
    modules, clients, by_module = read_modules(updates, None, "output")
    told = _told(rule, len(clients), {"contaminated": contaminated, "benign": benign, "rank": rank})
    facts = Facts(torch.stack([gram_matrix(module.updates) for module in modules]).sum(dim=0), **told)
    results = {}
    for module in modules:
        made, dtype = rule.combine(module.updates, facts), module.reference.dtype
        each = [_cast(update, dtype) for update in (made if rule.personal else [made])]
        results[module.name] = each if rule.personal else each * len(clients)
    return results if by_module else results[modules[0].name]


def _cast(update: Update, dtype: torch.dtype) -> Update:
    if isinstance(update, Tensor):
        return update.to(dtype)
    return LowRank(update.B.to(dtype), update.A.to(dtype), update.scale)


def _told(rule: Aggregator, K: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and return the one fact that the rule needs."""
    if not rule.told:
        return {}
    argument = TOLD[rule.told]
    value = given[argument]
    if value is None:
        raise ValueError(f"{rule.name} must be told the {rule.told}: give {argument}=")
    if argument == "contaminated" and not 0 <= value < K:
        raise ValueError(f"contaminated must lie in 0 .. {K - 1} for {K} clients; got {value}")
    if argument == "rank" and value < 1:
        raise ValueError(f"rank must be at least 1; got {value}")
    if argument == "benign" and (value.dtype != torch.bool or value.shape != (K,) or not value.any()):
        raise ValueError(f"benign must be a bool mask of the {K} clients, not empty; got {value}")
    return {argument: value}


def _by_gram(weights: Callable[[Tensor], Tensor]) -> Combine:
    """Make a rule: a weighted mean of clients with weights computed from the Gram matrix."""
    return lambda updates, facts: weighted_mean(updates, weights(facts.gram))


def _by_gram_and_number(weights: Callable[[Tensor, int], Tensor]) -> Combine:
    """Make a rule as `_by_gram` does, with weights that also use the number of contaminated clients."""
    return lambda updates, facts: weighted_mean(updates, weights(facts.gram, facts.contaminated))


def _benign_mean(updates: Updates, facts: Facts) -> Update:
    assert facts.benign is not None  # `aggregate` has checked it
    return weighted_mean(updates, cw.equal_weights(facts.benign.to(facts.gram.device)))


def _entrywise(updates: Updates, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a rule (K, b, q) -> (b, q) that treats every entry separately, over blocks of rows; dense (p, q)."""
    (p, q), K = updates[0].shape, len(updates)
    height = max(1, BLOCK_ENTRIES // (K * q))
    return torch.cat([rule(_rows(updates, slice(start, start + height))) for start in range(0, p, height)])


def _rows(updates: Updates, rows: slice) -> Tensor:
    """Return some rows of all updates, (K, b, q) in float64."""
    if isinstance(updates, Tensor):
        return updates[:, rows].double()
    return torch.stack([u.scale * (u.B[rows].double() @ u.A.double()) for u in updates])


def trimmed_mean(values: Tensor, trimmed: int) -> Tensor:
    """Average every entry over the clients (dim 0), without its ``trimmed`` largest and smallest values.

    Source: Yin, Chen, Ramchandran, Bartlett (ICML 2018), who assume 2 trimmed < K. Beyond that it is the median: for an
    even number of clients, the mean of the middle two.
    """
    K = len(values)
    cut = min(trimmed, (K - 1) // 2)
    return values.sort(dim=0).values[cut : K - cut].mean(dim=0)


def _coordinate_median(updates: Updates, facts: Facts) -> Tensor:
    return _entrywise(updates, lambda block: trimmed_mean(block, len(block)))


def _trimmed_mean(updates: Updates, facts: Facts) -> Tensor:
    return _entrywise(updates, lambda block: trimmed_mean(block, facts.contaminated))


def _mixed_trimmed_mean(updates: Updates, facts: Facts) -> Tensor:
    """Mix nearest neighbours, then take the trimmed mean of the mixed updates."""
    mixing, f = cw.nearest_neighbour_mixing(facts.gram, facts.contaminated), facts.contaminated
    return _entrywise(updates, lambda block: trimmed_mean(torch.einsum("jk,kbq->jbq", mixing, block), f))


def _robust_pca(updates: Updates, facts: Facts) -> Tensor:
    """Average the low-rank parts of the columns of [vec Theta_1 .. vec Theta_K] (p*q, K), all in memory at once.

    FedRPCA decomposes LoRA parameters instead of products. It adds the scaled mean of the sparse parts, which it takes
    for the clients' own knowledge. Here the sparse parts count as contamination and are left out.
    """
    X = _rows(updates, slice(None))
    low_rank, _ = robust_pca(X.flatten(1).T)
    return low_rank.mean(dim=1).reshape(X.shape[1:])


def _robust_pca_personal(updates: Updates, facts: Facts) -> Tensor:
    """Return the geometric median plus each client's low-rank part of the centred updates side by side (p, K*q).

    This rule is ours: the convex program of `clairlib.recovery.convex` with sparse entries in place of sparse clients.
    """
    X = _rows(updates, slice(None))
    centre = geometric_median(X)
    low_rank, _ = robust_pca((X - centre).permute(1, 0, 2).flatten(1))
    return centre + low_rank.reshape(X.shape[1], len(X), X.shape[2]).permute(1, 0, 2)


def _factor_mean(updates: Updates, facts: Facts) -> LowRank:
    """Return (mean of B) (mean of A), which is not the mean of the products."""
    B, A = _factors(updates)
    return LowRank(B.mean(dim=0), A.mean(dim=0))


def _shared_A(updates: Updates, facts: Facts) -> list[LowRank]:
    """Return each client's own B with the mean A."""
    B, A = _factors(updates)
    return [LowRank(own, A.mean(dim=0)) for own in B]


def _factors(updates: Updates) -> tuple[Tensor, Tensor]:
    """Stack the factors scale * B (K, p, rho) and A (K, rho, q); the adapters must have one rank."""
    if isinstance(updates, Tensor):
        raise TypeError("takes the factors of adapters; got dense updates")
    ranks = sorted({update.rank for update in updates})
    if len(ranks) > 1:
        raise ValueError(f"takes factors of one rank; got adapters of rank {', '.join(map(str, ranks))}")
    return torch.stack([u.scale * u.B for u in updates]), torch.stack([u.A for u in updates])


def _subspace_median(updates: Updates, facts: Facts) -> Tensor | list[LowRank]:
    """Return P Theta_k + P_perp C for every client, with P from Subspace-Median and C the geometric median.

    The source (arXiv:2309.14512) gives P: the geometric median of the clients' projectors U_k U_k', here rounded to its
    r leading eigenvectors. The rest is ours. U_k holds the r leading left singular vectors of Theta_k - C, whereas a
    node of the source holds samples of one matrix. The personal update is ours, too.
    """
    if isinstance(updates, Tensor):
        return _refine_by_median(updates.double(), facts.rank)
    cores = cores_of_factors(updates)
    return [cores.lift(core) for core in _refine_by_median(cores.core, facts.rank)]


def _refine_by_median(X: Tensor, rank: int) -> Tensor:
    """Compute the updates (K, p, q) of `_subspace_median` in any orthonormal coordinates."""
    centre = geometric_median(X)
    U = torch.linalg.svd(X - centre, full_matrices=False).U[..., :rank]  # (K, p, r)
    overlaps = torch.einsum("jpa,kpb->jkab", U, U).square().sum(dim=(2, 3))  # <U_j U_j', U_k U_k'>
    root = geometric_median_weights(overlaps).sqrt()
    side_by_side = (root[:, None, None] * U).permute(1, 0, 2).flatten(1)  # (p, K*r); times its transpose: the median
    basis = torch.linalg.svd(side_by_side, full_matrices=False).U[:, :rank]
    return X - project_out(basis, X - centre)


NUMBER, BLANCHARD = "number contaminated", "Blanchard et al. NeurIPS 2017"
_RULES = (
    Aggregator("local", "", lambda updates, facts: updates, personal=True),
    Aggregator("FedAvg", "McMahan et al. AISTATS 2017", _by_gram(cw.mean_weights)),
    Aggregator("FedAvg, benign only", "oracle", _benign_mean, told="benign set"),
    Aggregator("FedAvg, factors", "McMahan et al. AISTATS 2017", _factor_mean),
    Aggregator("FedSA", "Guo et al. arXiv:2410.01463", _shared_A, personal=True),
    Aggregator("norm filter", "z-score of norms", _by_gram(cw.norm_filter_weights)),
    Aggregator("coordinate median", "Yin et al. ICML 2018", _coordinate_median),
    Aggregator("trimmed mean", "Yin et al. ICML 2018", _trimmed_mean, told=NUMBER),
    Aggregator("Krum", BLANCHARD, _by_gram_and_number(cw.krum_weights), told=NUMBER),
    Aggregator("MultiKrum", BLANCHARD, _by_gram_and_number(cw.multikrum_weights), told=NUMBER),
    Aggregator("geometric median", "Pillutla et al. IEEE TSP 2022", _by_gram(geometric_median_weights)),
    Aggregator("centred clipping", "Karimireddy et al. ICML 2021", _by_gram(cw.centred_clipping_weights)),
    Aggregator("CAF", "Allouah et al. ICML 2025", _by_gram_and_number(cw.caf_weights), told=NUMBER),
    Aggregator("NNM + trimmed mean", "Allouah et al. AISTATS 2023", _mixed_trimmed_mean, told=NUMBER),
    Aggregator("entrywise RPCA", "after FedRPCA, arXiv:2506.01194", _robust_pca),
    Aggregator("entrywise RPCA, personal", "after Candes et al. J. ACM 2011", _robust_pca_personal, personal=True),
    Aggregator("Subspace-Median", "after arXiv:2309.14512", _subspace_median, personal=True, told="rank"),
)
AGGREGATORS: dict[str, Aggregator] = {rule.name: rule for rule in _RULES}
