"""Identifiability from exact updates: frames through a few clients, their consensus sets, and uniqueness.

An r-frame is a pair (P, C) of a rank-r projector and an off-subspace matrix C = P_perp C. Its consensus set is {k:
P_perp Theta_k = C}. Clients are given as a float64 stack Theta (K, p, q). The algebra has no noise. The last functions
plant clients at the border of what can be told apart. Statement 1 is our reconstruction (notebook 01), not the paper's.
"""

from dataclasses import dataclass, replace
from math import ceil, comb

import torch
from torch import Generator, Tensor

from clairlib.linalg.subspace import project_out
from clairlib.simulate import Planted, planted
from clairlib.simulate.attacks import random_frame

TOLERANCE = 1e-8  # relative to the norms of the clients; smaller values count as zero
CHUNK_ENTRIES = 2**22  # entries of the largest temporary while tuples are compared
TUPLE_LIMIT = 10**6  # most tuples in an exhaustive search
RIVALS = ("coalition", "anchored coalition", "sign_flip")
INSIDE_ATTACKS = ("spread", "one direction")


@dataclass(frozen=True)
class ExactFrame:
    """A frame that clients agree on exactly: ``basis`` U (p, d) and ``common_part`` C = P_perp C (p, q).

    ``members`` (K,) bool is the consensus set. If d < r, the clients that define the frame lie in many r-frames.
    """

    basis: Tensor
    common_part: Tensor
    members: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def size(self) -> int:
        return int(self.members.sum())


def tuple_size(rank: int, q: int) -> int:
    """Return the number of clients whose differences can span r directions, ceil(r / q) + 1: a pair when q >= r."""
    return ceil(rank / q) + 1


def chance_size(rank: int, q: int) -> int:
    """Return how many clients always lie in one r-frame, floor(r / q) + 1: their differences have at most r columns."""
    return rank // q + 1


def difference_ranks(targets: Tensor) -> Tensor:
    """Return the numerical ranks (K, K) of Theta_j - Theta_k, zero on the diagonal."""
    K = len(targets)
    pairs = torch.combinations(torch.arange(K), 2)
    ranks = torch.zeros(K, K, dtype=torch.long)
    ranks[pairs[:, 0], pairs[:, 1]] = tuple_ranks(targets, pairs)
    return ranks + ranks.T


def tuple_ranks(targets: Tensor, tuples: Tensor) -> Tensor:
    """Return the dimension (T,) of the span of the differences within tuples of clients (T, t), up to ``TOLERANCE``."""
    norms = torch.linalg.matrix_norm(targets)
    step = max(1, CHUNK_ENTRIES // (tuples.shape[1] * targets[0].numel()))
    ranks = []
    for part in tuples.split(step):
        values = torch.linalg.svdvals(_differences(targets[part]))
        ranks.append((values > TOLERANCE * norms[part].amax(dim=1, keepdim=True)).sum(dim=1))
    return torch.cat(ranks)


def _differences(groups: Tensor) -> Tensor:
    """Return [Theta_2 - Theta_1, .., Theta_t - Theta_1] (..., p, (t-1) q) of groups of clients (..., t, p, q)."""
    return (groups[..., 1:, :, :] - groups[..., :1, :, :]).movedim(-3, -2).flatten(-2)


def frame_through(targets: Tensor, clients: Tensor) -> ExactFrame:
    """Return the smallest frame through some clients (t,), which their differences span, and all clients in it."""
    group = targets[clients]
    vectors, values, _ = torch.linalg.svd(_differences(group), full_matrices=False)
    basis = vectors[:, values > TOLERANCE * torch.linalg.matrix_norm(group).max()]
    common_part = project_out(basis, group[0])
    return ExactFrame(basis, common_part, consensus_set(targets, basis, common_part))


def consensus_set(targets: Tensor, basis: Tensor, common_part: Tensor) -> Tensor:
    """Return the clients (K,) bool with P_perp Theta_k = C, up to ``TOLERANCE`` relative to their norm."""
    off = torch.linalg.matrix_norm(project_out(basis, targets) - common_part)
    return off <= TOLERANCE * (torch.linalg.matrix_norm(targets) + torch.linalg.matrix_norm(common_part))


def consensus_frames(targets: Tensor, rank: int) -> list[ExactFrame]:
    """Return all frames of at most r dimensions through tuples of ``tuple_size`` clients, largest consensus set first.

    The search is exhaustive over tuples; more than ``TUPLE_LIMIT`` raise a ValueError. It misses an r-frame only if
    none of the frame's tuples spans all of it, which assumption (a) of Statement 1 rules out for the benign frame.
    """
    K, _, q = targets.shape
    t = tuple_size(rank, q)
    if comb(K, t) > TUPLE_LIMIT:
        raise ValueError(f"{comb(K, t)} tuples of {t} among {K} clients are more than {TUPLE_LIMIT}")
    tuples = torch.combinations(torch.arange(K), t)
    frames: list[ExactFrame] = []
    wide: list[Tensor] = []  # consensus sets that hold other tuples too
    for clients in tuples[tuple_ranks(targets, tuples) <= rank]:
        if any(bool(members[clients].all()) for members in wide):
            continue  # its consensus set is inside that one
        frames.append(frame_through(targets, clients))
        if frames[-1].size > t:
            wide.append(frames[-1].members)
    return sorted(frames, key=lambda frame: -frame.size)


def identified_frame(frames: list[ExactFrame], rank: int, q: int) -> ExactFrame | None:
    """Return the unique r-frame of largest consensus set among ``consensus_frames``, or None if tied or no evidence.

    There is none if no set is larger than ``chance_size``, or if the largest spans fewer than r directions.
    """
    if not frames or frames[0].size <= chance_size(rank, q) or frames[0].rank < rank:
        return None
    tie = len(frames) > 1 and frames[1].size == frames[0].size
    return None if tie else frames[0]


def moved_gauge(
    basis: Tensor, common_part: Tensor, coefficients: Tensor, shift: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return other parameters (U R, M - U B, R' (A_k + B)) of the same updates M + U A_k.

    ``coefficients`` is A (K, r, q), ``shift`` B (r, q), a part of P M that moves into them, and ``rotation`` R in O(r).
    """
    return basis @ rotation, common_part - basis @ shift, rotation.mT @ (coefficients + shift)


def rivals(kind: str, benign: int, count: int, noise: float, *, generator: Generator) -> tuple[Planted, Tensor]:
    """Plant ``count`` contaminated clients that agree among themselves; also return the set (K,) bool that they form.

    An "anchored coalition" takes its common part from one benign client's update. It belongs to the set, too.
    """
    K = benign + count
    base = "coalition" if kind == "anchored coalition" else kind
    truth = planted(base, share=count / K, K=K, noise_std=noise, generator=generator)
    rival = ~truth.benign
    if kind != "anchored coalition":
        return truth, rival
    anchor = int(truth.benign.nonzero()[0])
    (p, r), q = truth.basis.shape, truth.common_part.shape[1]
    frame = random_frame(p, r, generator=generator)
    steps = torch.randn(count, r, q, generator=generator, dtype=torch.float64) / q**0.5
    targets = truth.targets.clone()
    targets[rival] = targets[anchor] + frame @ steps
    rival[anchor] = True
    return replace(truth, targets=targets, updates=truth.updates - truth.targets + targets), rival


def attacked(truth: Planted, attack: str, attackers: int, size: float, *, generator: Generator) -> Planted:
    """Return planted clients whose first ``attackers`` clients move inside the subspace, and only there.

    They have Theta_k = M + ``size`` U A_k', with E ||A_k'||_F^2 = r as for the others. With ``attack`` "one direction"
    they all move in the same direction with the same coefficients, with "spread" in all directions.
    """
    q = truth.common_part.shape[1]
    A = torch.randn(attackers, truth.rank, q, generator=generator, dtype=torch.float64) / q**0.5
    if attack == "one direction":
        first = A[0, 0] * truth.rank**0.5
        A = torch.zeros_like(A)
        A[:, 0] = first
    targets = truth.targets.clone()
    targets[:attackers] = truth.common_part + size * truth.basis @ A
    return replace(truth, targets=targets, updates=truth.updates - truth.targets + targets)
