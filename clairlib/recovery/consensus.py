"""Consensus solver: the frame that the largest group of clients agrees on, with nothing known in advance.

Candidate sets grow from a few starts, one client group at a time, each judged on residuals left one out; the partition
of the clients into frames and outliers with the shortest description decides between them. Beyond the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log

import torch
from torch import Generator, Tensor

from clairlib.recovery.description_length import best_set
from clairlib.recovery.detection import FAMILY_ERROR, benign_set, calibrate
from clairlib.recovery.effective_dimensions import SharedBlock
from clairlib.recovery.frame import Frame, fit_frame, floor_energy, rank_limit
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE, inside_energy, log_scores, shared_structure
from clairlib.recovery.start_sets import (
    START_RANK,
    candidate_tuples,
    robust_half,
    score_tuples,
    spread_starts,
    start_sets,
)

SHORTLIST_OF_REST = 20  # tuples among the clients that a set left out, of which one start is taken
GROWTH = 1.5  # times as many clients a round, at most
SPLIT_CHECK_FRACTION = 0.75  # part of the clients from which on a set is checked for a smaller group in it
CUT_LOSS = 0.05  # of log-likelihood a client that two groups may lose against one: a quarter of what halves of one lose
SPLITS = 10  # times in a row, at most, that a set is replaced by the closer part of the clients


def consensus(
    X: Tensor,
    weights: Tensor,
    *,
    rank: int | None = None,
    shared_block: SharedBlock | None = None,
    generator: Generator,
) -> Frame:
    """The frame that describes most members in the shortest description of the clients.

    Parameters
    ----------
    X : Tensor (K, p, q), float64
        Client updates, or their cores.
    weights : Tensor (K,)
        Noise variance of client k is proportional to 1 / weights[k].
    rank : int, optional
        Rank of the shared subspace; estimated where None.
    common : (rows, columns), optional
        Those that all clients have in common, as in `frames`; all of them where None.
    generator : Generator
        Draws the tuples when there are more than ``starts.TUPLE_LIMIT``.
    """
    shared_block = shared_block or (X.shape[1], X.shape[2])
    tuples = candidate_tuples(len(X), *shared_block, generator=generator)
    order, distances = score_tuples(X, tuples, shared_block)
    candidates: list[Frame] = []
    judge = FrameCache(X, weights, rank, shared_block)

    def add(start: Tensor) -> None:
        for frame in grow_twice(judge, start):
            if not any(torch.equal(frame.members, known.members) for known in candidates):
                candidates.append(frame)

    everybody = torch.ones(len(X), dtype=torch.bool, device=X.device)
    half = robust_half(X, weights, rank, shared_block)
    add(half)
    for start in spread_starts(start_sets(X, tuples, order, distances, everybody, shared_block=shared_block)):
        add(start)
    for frame in list(candidates):  # whom a set left out may be a group of its own, and then describes itself
        rest = start_sets(X, tuples, order, distances, ~frame.members, SHORTLIST_OF_REST, shared_block)
        for start in rest[:1]:
            add(start)
    if not candidates:
        return fit_frame(X, weights, everybody, rank, shared_block)
    best = best_set(X, weights, candidates)
    if best.size >= SPLIT_CHECK_FRACTION * len(X):  # all agree, or a group in much noise grew into its surroundings
        others = [part for part in split_off(judge, (everybody, half)) if not torch.equal(part.members, best.members)]
        best = best_set(X, weights, [best, *others]) if others else best
    if 2 * best.size < len(X):
        best = larger_group(X, weights, rank, best, candidates, generator)
    return best


def larger_group(
    X: Tensor, weights: Tensor, rank: int | None, best: Frame, candidates: Sequence[Frame], generator: Generator
) -> Frame:
    """The frame of a larger group among the other clients that share a subspace, or ``best`` where there is none.

    The shortest description goes by how well a group agrees. A few contaminated clients that send the same update, or
    updates without noise, agree better than any honest ones; then the larger group decides. It is sought among the
    ``candidates`` first, then anew. A group counts with all whom the verdict would not tell from its members.
    """
    others = ~best.members
    K = int(others.sum())
    if K < 3 or (rank or 0) > rank_limit(K, best.shared_block[0], X.shape[2]):
        return best
    rest, w = X[others], weights[others]

    def is_group(frame: Frame) -> bool:
        return frame.size > best.size and bool(shared_structure(rest, w, frame) >= MIN_EXPLAINED_VARIANCE)

    apart = [frame.members[others] for frame in candidates if not bool((frame.members & best.members).any())]
    known = [frame for frame in (fit_frame(rest, w, own, rank, best.shared_block) for own in apart) if is_group(frame)]
    if known:
        group = best_set(rest, w, known)
    else:
        group = consensus(rest, w, rank=rank, shared_block=best.shared_block, generator=generator)
    group = fit_frame(rest, w, like_members(rest, w, group), rank, best.shared_block)
    if not is_group(group):
        return best
    members = torch.zeros_like(others)
    members[others] = group.members
    return fit_frame(X, weights, members, rank, best.shared_block)


def like_members(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Whom the verdict calls benign when the frame's members are (K,) bool."""
    x, variance = log_scores(X, weights, frame)
    inside = inside_energy(X, weights, frame).clamp(min=floor_energy(X)).log()
    return benign_set(x, frame.members, calibrate(x, frame.members, variance).p_values, variance, inside)


class FrameCache:
    """Frame of a set of clients, and how every client stands to it: ``log_scores`` with their variance.

    Remembers every set it was asked about: growing from different starts runs through the same sets again and again.
    """

    def __init__(self, X: Tensor, weights: Tensor, rank: int | None, shared_block: SharedBlock | None = None) -> None:
        self.X, self.weights, self.rank, self.shared_block = X, weights, rank, shared_block
        # fewer clients span a given rank with nothing left over when one is left out
        self.least = 3 if rank is None else max(3, ceil(rank / X.shape[2]) + 2)
        self._known: dict[bytes, tuple[Frame, Tensor, float]] = {}

    def __call__(self, members: Tensor) -> tuple[Frame, Tensor, float]:
        key = members.cpu().numpy().tobytes()
        if key not in self._known:
            frame = fit_frame(self.X, self.weights, members, self.rank, self.shared_block)
            self._known[key] = (frame, *log_scores(self.X, self.weights, frame))
        return self._known[key]


def split_off(judge: FrameCache, starts: Sequence[Tensor]) -> list[Frame]:
    """Frames of the sets that cutting the scores in two leaves of the ``starts`` (K,) bool.

    The description decides whether a cut was right, by the directions that the others have of their own. Of few columns
    it sees little more than energies, and would cut clients of unequal noise in two: there the scores must show it.
    """
    frames = []
    for start in starts:
        frame, x, variance = judge(split_repeatedly(judge, start))
        if judge.X.shape[2] >= START_RANK or are_two_groups(x, frame.members, variance):
            frames.append(frame)
    return [frame for frame in frames if frame.size >= judge.least]


def split_repeatedly(judge: FrameCache, members: Tensor) -> Tensor:
    """The set (K,) bool reached by taking the closer part of the clients, and of those as close to it, again and again.

    Growing takes in whoever cannot be told from a member, one by one, which loses a small group in noise; cutting all
    scores in two where they differ most does not.
    """
    for _ in range(SPLITS):
        part = closer_part(judge(members)[1])
        if int(part.sum()) < judge.least or torch.equal(part, members):
            break
        members = part
    return members


def are_two_groups(x: Tensor, members: Tensor, variance: float) -> bool:
    """Are the scores (K,) of the members and of the others two groups, rather than the two halves of one?

    Whether two normals, each client in its own, have nearly the likelihood of one normal for all: the classification
    likelihood (Biernacki, Celeux and Govaert 2000), in which halves of one normal lose log 2 - log(1 - 2 / pi)^(-1/2) =
    .19 a client, and two equal groups lose less than ``CUT_LOSS`` from 3.3 standard deviations apart. No variance is
    below ``variance``.
    """
    K, n = len(x), int(members.sum())
    if n == K:
        return False
    split = _log_likelihood(x[members], variance) + _log_likelihood(x[~members], variance)
    return split + n * log(n / K) + (K - n) * log(1 - n / K) > _log_likelihood(x, variance) - CUT_LOSS * K


def _log_likelihood(x: Tensor, least: float) -> float:
    """Of values (n,) under the normal that fits them best, its variance at least ``least``; less constants."""
    n, squares = len(x), float((x - x.mean()).square().sum())
    variance = max(squares / n, least)
    return -0.5 * (n * log(variance) + squares / variance)


def closer_part(x: Tensor) -> Tensor:
    """The lower (K,) bool of two groups of scores: the cut with the largest variance between them (Otsu 1979).

    Everybody where all scores are the same.
    """
    ordered, order = x.sort()
    if ordered[0] == ordered[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    K = len(x)
    n = torch.arange(1, K, dtype=x.dtype, device=x.device)
    low = ordered.cumsum(0)[:-1] / n
    high = (ordered.sum() - n * low) / (K - n)
    lower = torch.zeros(K, dtype=torch.bool, device=x.device)
    lower[order[: int((n * (K - n) * (high - low).square()).argmax()) + 1]] = True
    return lower


def grow_twice(judge: FrameCache, start: Tensor) -> list[Frame]:
    """Sets grown from a start: one that stops early, and one that goes on from there.

    The first leaves out whoever is unusual at level ``FAMILY_ERROR`` by itself, so that a small benign set does not
    slide into its surroundings; the second only whoever is unusual among all K, so that nobody is lost by chance.
    """
    frames = []
    for level in (FAMILY_ERROR, FAMILY_ERROR / len(start)):
        frame = grow(judge, start, level)
        if frame is None:
            break
        frames.append(frame)
        start = frame.members
        if bool(start.all()):
            break
    return frames


def grow(judge: FrameCache, members: Tensor, level: float) -> Frame | None:
    """Grow a set of clients by at most half a round, refitting, until the same set returns.

    A round scores every client against the frame left one out and keeps the closest that fit, that is whose p-value
    against the members exceeds ``level``. None when fewer than three clients fit together.
    """
    seen: list[Tensor] = []
    while int(members.sum()) >= 3:
        frame, x, variance = judge(members)
        fits = calibrate(x, members, variance).p_values > level
        target = max(frame.size + 1, ceil(GROWTH * frame.size))
        order = x.argsort()[:target]
        grown = torch.zeros_like(members)
        grown[order[fits[order]]] = True
        if any(torch.equal(grown, known) for known in [*seen, members]):
            return frame if frame.size >= judge.least else None
        seen.append(members)
        members = grown
    return None
