"""Client updates in factored form, and the small cores from which everything is computed.

A LoRA adapter changes a weight matrix by ``scale * B @ A``. The p x q product is never formed. Instead, the clients'
factors are reduced to K small cores in orthonormal coordinates, which keep every norm, angle and singular value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = 1e-13  # directions below this fraction of the largest singular value hold rounding only
SURE = 1e-10


@dataclass(frozen=True)
class LowRank:
    """One client's update ``scale * B @ A`` of a p x q weight matrix, kept as factors.

    ``B`` (p, rho) and ``A`` (rho, q) are the factors of the output and the input side, PEFT's ``lora_B`` and
    ``lora_A``. ``scale`` is alpha / rho for LoRA, alpha / sqrt(rho) for rsLoRA.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Adapter rank rho, the inner dimension of the factors."""
        return self.B.shape[1]

    def dense(self) -> Tensor:
        """Return the p x q update itself, for tests and dense input."""
        return self.scale * (self.B @ self.A)


@dataclass(frozen=True)
class Cores:
    """Updates in orthonormal coordinates: Theta_k = left @ core[k] @ right.T.

    ``core`` is (K, m, n), float64. ``left`` (p, m) and ``right`` (q, n) have orthonormal columns, so norms, inner
    products, projections and singular values of the cores are those of the updates; None: the original coordinates.
    """

    core: Tensor
    left: Tensor | None
    right: Tensor | None

    @property
    def shared_block(self) -> tuple[int, int]:
        """Number of rows and of columns that are coordinates of all clients, which is all of them."""
        return self.core.shape[1], self.core.shape[2]

    def lift_rows(self, columns: Tensor) -> Tensor:
        """Return vectors (m, j) in core coordinates as vectors (p, j) of the output side."""
        return columns if self.left is None else self.left @ columns

    def lift_columns(self, columns: Tensor) -> Tensor:
        """Return vectors (n, j) in core coordinates as vectors (q, j) of the input side."""
        return columns if self.right is None else self.right @ columns

    def lift(self, core: Tensor) -> LowRank:
        """Return a matrix (m, n) in core coordinates as a factored p x q update, without directions that are zero."""
        U, s, Vh = torch.linalg.svd(core, full_matrices=False)
        keep = max(1, int((s > s[0] * 1e-15 * max(core.shape)).sum())) if s.numel() else 0
        root = s[:keep].sqrt()
        return LowRank(self.lift_rows(U[:, :keep] * root), (self.lift_columns(Vh[:keep].T * root)).T)


def _orthonormal_side(blocks: list[Tensor], length: int) -> tuple[Tensor | None, list[Tensor]]:
    """Return an orthonormal basis of the joint columns of blocks (length, rho_k), and the blocks in it.

    The basis is None, and the blocks are unchanged, if they have at least ``length`` columns in all.
    """
    widths = [block.shape[1] for block in blocks]
    if sum(widths) >= length:
        return None, blocks
    Q, R = torch.linalg.qr(torch.cat(blocks, dim=1))  # (length, N), (N, N)
    return Q, list(R.split(widths, dim=1))


def cores_of_factors(updates: Sequence[LowRank]) -> Cores:
    """Compute the cores of factored updates by two thin QR factorisations, at cost O((p + q) N^2), N = sum of ranks."""
    p, q = updates[0].shape
    left, B = _orthonormal_side([u.scale * u.B.double() for u in updates], p)
    right, At = _orthonormal_side([u.A.double().T for u in updates], q)
    return _without_empty_directions(Cores(torch.stack([b @ at.T for b, at in zip(B, At, strict=True)]), left, right))


def cores_of_dense(updates: Tensor) -> Cores:
    """Compute the cores of a dense stack (K, p, q), without the directions of either side that no client uses."""
    return _without_empty_directions(Cores(updates.double(), None, None))


def _without_empty_directions(cores: Cores) -> Cores:
    """Reduce the coordinates to the updates' joint column and row space; raise OverflowError beyond float64."""
    core, left, right = cores.core, cores.left, cores.right
    if not bool(core.isfinite().all()):
        raise OverflowError("an update overflows float64")
    if (rows := _used_directions(core)) is not None:
        core, left = rows.T @ core, cores.lift_rows(rows)
    if (columns := _used_directions(core.mT)) is not None:
        core, right = core @ columns, cores.lift_columns(columns)
    return Cores(core, left, right)


def _used_directions(core: Tensor) -> Tensor | None:
    """Return an orthonormal basis (m, j) of the joint column space of the blocks (K, m, n); None if j = m."""
    K, m, n = core.shape
    core = core / core.abs().max().clamp(min=torch.finfo(core.dtype).tiny)  # squares neither overflow nor vanish
    if K * n >= m:
        spectrum = torch.linalg.eigvalsh(torch.einsum("kmn,kln->ml", core, core))
        # The eigenvalues are squares, so a ratio above SURE is far above rounding, and no SVD is needed.
        if spectrum[0] > SURE * spectrum[-1]:
            return None
    U, s, _ = torch.linalg.svd(core.permute(1, 0, 2).reshape(m, K * n), full_matrices=False)
    used = max(1, int((s > EMPTY * s[:1]).sum()))
    return None if used == m else U[:, :used]


def truncate(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best rank-``rank`` approximation in Frobenius norm (Eckart-Young), and its relative Frobenius error.

    The factors are balanced (both carry the square root of the singular values), with scale 1, the dtype and device of
    ``update``, and inner dimension exactly ``rank``, padded with zeros if the update has fewer directions. The error is
    ||update - truncated|| / ||update|| before rounding to the dtype; 0 for a zero update.
    """
    Qb, Rb = torch.linalg.qr(update.scale * update.B.double())
    Qa, Ra = torch.linalg.qr(update.A.double().T)
    U, s, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    keep = min(rank, s.numel())
    root = s[:keep].sqrt()
    B = update.B.new_zeros(update.shape[0], rank)
    A = update.A.new_zeros(rank, update.shape[1])
    B[:, :keep] = (Qb @ (U[:, :keep] * root)).to(B.dtype)
    A[:keep] = ((Qa @ (Vh[:keep].T * root)).T).to(A.dtype)
    total = torch.linalg.vector_norm(s)
    error = float(torch.linalg.vector_norm(s[keep:]) / total) if total > 0 else 0.0
    return LowRank(B, A), error


def as_dense(updates: Mapping[str, Tensor | Sequence[LowRank]]) -> dict[str, Tensor]:
    """Return the updates by module as dense matrices (K, p, q), float64; updates from adapters keep their rank."""
    return {name: torch.stack([_dense(update) for update in own]) for name, own in updates.items()}


def _dense(update: Tensor | LowRank) -> Tensor:
    return update.double() if isinstance(update, Tensor) else update.scale * (update.B.double() @ update.A.double())
