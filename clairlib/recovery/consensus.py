"""Consensus solver: find the frame on which the largest group of clients agrees, with nothing known in advance.

Candidate sets grow from a few start sets. In each round a set keeps the clients whose leave-one-out residuals fit it.
The description length then decides between the candidates. This solver is not from the paper.
"""

from collections.abc import Sequence
from math import ceil, log

import torch
from torch import Generator, Tensor

from clairlib.recovery import start_sets as starts
from clairlib.recovery.description_length import best_set
from clairlib.recovery.detection import FAMILY_ERROR, benign_set, calibrate
from clairlib.recovery.effective_dimensions import SharedBlock
from clairlib.recovery.frame import Frame, fit_frame, rank_limit
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE, LeaveOneOut
from clairlib.recovery.scores import log_scores
from clairlib.recovery.start_sets import candidate_tuples, robust_half, score_tuples, spread_starts, start_sets

SHORTLIST_OF_REST = 20  # tuples among the clients outside a candidate set, from which one further start is taken
GROWTH = 1.5  # largest factor by which a set grows in a round
SPLIT_CHECK_FRACTION = 0.75  # a set with at least this fraction of the clients is checked for a smaller group in it
# Log-likelihood per client that two groups may lose against one; the halves of one normal lose four times as much.
CUT_LOSS = 0.05
SPLITS = 10  # largest number of successive cuts of a set to its closer part


def consensus(
    X: Tensor, weights: Tensor, *, generator: Generator, rank: int | None = None,
    shared_block: SharedBlock | None = None,
) -> Frame:
    """Return the frame with the most members in the shortest description of the clients.

    X (K, p, q), float64, are the updates or their cores, and ``weights`` (K,) their weights. ``rank`` is estimated if
    None. ``shared_block`` (rows, columns) is as in `clairlib.recovery.frame`. ``generator`` draws the tuples.
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
    for frame in list(candidates):  # clients outside a set may be a group with a frame of its own
        rest = start_sets(X, tuples, order, distances, ~frame.members, SHORTLIST_OF_REST, shared_block)
        for start in rest[:1]:
            add(start)
    if not candidates:
        return fit_frame(X, weights, everybody, rank, shared_block)
    best = best_set(X, weights, candidates)
    # either all agree, or the set has grown beyond a group whose noise is large
    if best.size >= SPLIT_CHECK_FRACTION * len(X):
        others = [part for part in split_off(judge, (everybody, half)) if not torch.equal(part.members, best.members)]
        best = best_set(X, weights, [best, *others]) if others else best
    if 2 * best.size < len(X):
        best = larger_group(X, weights, rank, best, candidates, generator)
    return best


def larger_group(
    X: Tensor, weights: Tensor, rank: int | None, best: Frame, candidates: Sequence[Frame], generator: Generator
) -> Frame:
    """Return the frame of a larger group that shares a subspace among the other clients, or ``best`` if there is none.

    The description length depends on how well a group agrees. A few contaminated clients that send the same or
    noiseless updates agree better than honest clients ever do; then the larger group decides. It is searched among
    ``candidates``, then by a new run, and includes all clients that the verdict cannot tell from it.
    """
    others = ~best.members
    K = int(others.sum())
    if K < 3 or (rank or 0) > rank_limit(K, best.shared_block[0], X.shape[2]):
        return best
    rest, w = X[others], weights[others]

    def is_group(frame: Frame) -> bool:
        if frame.size <= best.size:
            return False
        return bool(LeaveOneOut(rest, w, frame).explained_variance >= MIN_EXPLAINED_VARIANCE)

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
    """Return the clients (K,) bool that the verdict calls benign if the frame's members are benign."""
    left_out = LeaveOneOut(X, weights, frame)
    x, variance = log_scores(left_out)
    return benign_set(x, frame.members, calibrate(x, frame.members, variance).p_values, variance, left_out.inside)


class FrameCache:
    """Frames of sets of clients, each fitted once, with the log scores (K,) of all clients and their variance."""

    def __init__(self, X: Tensor, weights: Tensor, rank: int | None, shared_block: SharedBlock | None = None) -> None:
        self.X, self.weights, self.rank, self.shared_block = X, weights, rank, shared_block
        # With fewer members, r directions fit the members exactly when one of them is left out.
        self.least = 3 if rank is None else max(3, ceil(rank / X.shape[2]) + 2)
        self._known: dict[bytes, tuple[Frame, Tensor, float]] = {}

    def __call__(self, members: Tensor) -> tuple[Frame, Tensor, float]:
        key = members.cpu().numpy().tobytes()
        if key not in self._known:
            frame = fit_frame(self.X, self.weights, members, self.rank, self.shared_block)
            self._known[key] = (frame, *log_scores(LeaveOneOut(self.X, self.weights, frame)))
        return self._known[key]


def split_off(judge: FrameCache, sets: Sequence[Tensor]) -> list[Frame]:
    """Cut each of the ``sets`` (K,) bool repeatedly by the scores; return the frames of the sets that remain.

    The description length decides whether a cut was right, by the directions of the clients on its other side. With few
    columns it compares little more than energies; then a frame is kept only if the scores form two groups.
    """
    frames = []
    for members in sets:
        frame, x, variance = judge(split_repeatedly(judge, members))
        if judge.X.shape[2] >= starts.START_RANK or are_two_groups(x, frame.members, variance):
            frames.append(frame)
    return [frame for frame in frames if frame.size >= judge.least]


def split_repeatedly(judge: FrameCache, members: Tensor) -> Tensor:
    """Replace the set (K,) bool by the part of all clients closest to its frame, again and again, until it stays.

    Growing adds every client that cannot be told apart from a member, one by one, and so loses a small group if its
    noise is large. Cutting all scores in two at their largest difference does not.
    """
    for _ in range(SPLITS):
        part = closer_part(judge(members)[1])
        if int(part.sum()) < judge.least or torch.equal(part, members):
            break
        members = part
    return members


def are_two_groups(x: Tensor, members: Tensor, variance: float) -> bool:
    """Return whether the scores (K,) of the members and of the others are two groups rather than two halves of one.

    Two normals, each client in its own, are compared with one by the classification likelihood (Biernacki, Celeux and
    Govaert 2000). In it, the halves of one normal lose log 2 - log(1 - 2 / pi)^(-1/2) = .19 per client, and two equal
    groups at least 3.3 standard deviations apart less than ``CUT_LOSS``. Variances are at least ``variance``.
    """
    K, n = len(x), int(members.sum())
    if n == K:
        return False
    split = _log_likelihood(x[members], variance) + _log_likelihood(x[~members], variance)
    return split + n * log(n / K) + (K - n) * log(1 - n / K) > _log_likelihood(x, variance) - CUT_LOSS * K


def _log_likelihood(x: Tensor, least: float) -> float:
    """Return the log-likelihood of values (n,), up to constants, under the best normal with variance >= ``least``."""
    n, squares = len(x), float((x - x.mean()).square().sum())
    variance = max(squares / n, least)
    return -0.5 * (n * log(variance) + squares / variance)


def closer_part(x: Tensor) -> Tensor:
    """Return the lower scores (K,) bool by the cut of largest variance between groups (Otsu 1979); all if equal."""
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
    """Grow a set from a start at a strict level, then go on from the result at a lenient level; return the frames.

    The first leaves out clients with p-values below ``FAMILY_ERROR``, so that a small benign set does not take in
    clients around it. The second divides this level by K, so that benign clients are rarely left out by chance.
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
    """Grow a set of clients, at most by the factor ``GROWTH`` per round, and refit it until a set returns.

    A client fits if the p-value of its leave-one-out residual against the members exceeds ``level``; the closest
    clients that fit form the next set. None if fewer than three clients fit together.
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
