"""Planted clients that differ in size, noise and tails, and contaminated clients beside them.

Theta_k = a_k (M + U A_k) + sigma_k E_k in every module. The generator is written anew, apart from the one of
`clairlib.simulate`, so that the method is measured on data for which it was not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import LowRank

NOISE = 0.4  # Frobenius norm of the noise of an update, where the common part has norm 1
LARGE = 10.0  # the coefficients of the one large client, over those of the others

Updates = Tensor | list[LowRank]


@dataclass(frozen=True)
class Design:
    """Shapes of the updates: K clients, p x q, shared rank r, and how they are given.

    ``geometry`` is "dense", or that of LoRA adapters of rank ``adapter_rank``: "frozen" A, A from a "common" start, or
    from each client's "own" start. ``modules`` is their number L.
    """

    geometry: str = "dense"
    K: int = 20
    p: int = 50
    q: int = 10
    r: int = 3
    adapter_rank: int = 8
    modules: int = 1

    @property
    def columns(self) -> int:
        """Columns in which the noise lies: q of a dense update, the adapter's rank otherwise."""
        return self.q if self.geometry == "dense" else self.adapter_rank


@dataclass(frozen=True)
class Honest:
    """How honest clients differ.

    ``sizes`` is the standard deviation of log a_k. ``samples`` n : 1 draws sample sizes log-uniformly over this range;
    the noise variance is proportional to 1 / n_k. ``tails`` are "normal", "entries" (t with 3 degrees of freedom an
    entry) or "rows" (a row). With ``large`` the coefficients of the first client are `LARGE` times as large.
    """

    sizes: float = 0.0
    samples: float = 1.0
    tails: str = "normal"
    large: bool = False


@dataclass(frozen=True)
class Attack:
    """What contaminated clients do: a ``share`` of the clients, or ``count`` of them, deviate in one way.

    ``kind``: "unstructured" and "coalition" replace the common part and the subspace by an own or by one of all;
    "population" replaces the common part alone, by one of all; "sign_flip" sends the negative; "weak" adds r random
    directions off the subspace, of ``energy`` together; "towards" goes from the honest towards the unstructured update
    until the energy off the subspace is ``energy``; "module" adds a random rank-one step of ``energy`` in one module,
    the same module for all or, if ``apart``, one of each client's own. Steps differ, unless ``together``.
    """

    kind: str = "none"
    share: float = 0.3
    count: int | None = None
    energy: float = 0.12
    apart: bool = False
    together: bool = False


@dataclass(frozen=True)
class Drawn:
    """Clients of one draw: ``updates`` and honest ``targets`` (K, p, q) by module, ``benign`` (K,), a_k and sigma_k.

    Of a second population ``targets`` has its own. ``bases`` U and ``common`` M are by module, in the columns in which
    the noise lies. ``attacked`` are the names of the modules with a deviation by client index.
    """

    updates: dict[str, Updates]
    targets: dict[str, Tensor]
    bases: dict[str, Tensor]
    common: dict[str, Tensor]
    benign: Tensor
    scales: Tensor
    noise: Tensor
    attacked: dict[int, str]


def draw(design: Design, honest: Honest, attack: Attack, *, seed: int, index: int) -> Drawn:
    """Draw the clients of one draw by the names of its settings; see the classes for their meaning."""
    generator = derive(seed, "unequal", repr(design), repr(honest), repr(attack), index)
    K, L = design.K, design.modules
    count = attack.count if attack.count is not None else round(attack.share * K)
    bad = torch.randperm(K, generator=generator)[: 0 if attack.kind == "none" else count].sort().values
    benign = torch.ones(K, dtype=torch.bool)
    benign[bad] = False
    scales = (honest.sizes * _normal(K, generator=generator)).exp()
    samples = honest.samples ** (torch.rand(K, generator=generator, dtype=torch.float64) - 0.5)
    noise = NOISE / samples.sqrt()
    names = [f"module_{m}" for m in range(L)]
    places = torch.randint(L, (len(bad),), generator=generator).tolist()
    if not attack.apart:
        places = places[:1] * len(bad)
    attacked = {k: names[m] for k, m in zip(bad.tolist(), places, strict=True)} if attack.kind == "module" else {}
    drawn = Drawn({}, {}, {}, {}, benign, scales, noise, attacked)
    for name in names:
        own = torch.tensor([k for k in bad.tolist() if attacked.get(k, name) == name], dtype=torch.long)
        _module(design, honest, attack, own, drawn, name, generator)
    return drawn


def _normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _basis(p: int, r: int, generator: Generator) -> Tensor:
    return torch.linalg.qr(_normal(p, r, generator=generator))[0]


def _common(p: int, q: int, generator: Generator) -> Tensor:
    M = _normal(p, q, generator=generator)
    return M / torch.linalg.matrix_norm(M)


def _module(
    design: Design, honest: Honest, attack: Attack, bad: Tensor, drawn: Drawn, name: str, generator: Generator
) -> None:
    """Draw the module ``name`` into ``drawn``; the clients ``bad`` deviate in it. A row of A_k has norm one."""
    K, p, n, r = design.K, design.p, design.columns, design.r
    U, M = _basis(p, r, generator), _common(p, n, generator)
    A = _normal(K, r, n, generator=generator) / n**0.5
    if honest.large:
        A[0] *= LARGE
    if design.geometry == "own":  # with rows of their own, clients cannot share a common part
        M = torch.zeros_like(M)
    targets = M + U @ A
    sent = targets.clone()
    if len(bad):
        sent[bad] = _deviating(attack, targets[bad], U, M, generator)
    if attack.kind == "population":
        targets = sent
    E = _noise(honest.tails, K, p, n, generator)
    scaled = drawn.scales[:, None, None]
    sent, targets = scaled * sent + drawn.noise[:, None, None] * E, scaled * targets
    drawn.bases[name], drawn.common[name] = U, M
    drawn.updates[name], drawn.targets[name] = sent, targets
    if design.geometry != "dense":
        rows = _rows(design, generator)
        drawn.updates[name] = [LowRank(B, A_k) for B, A_k in zip(sent, rows, strict=True)]
        drawn.targets[name] = targets @ rows


def _rows(design: Design, generator: Generator) -> Tensor:
    """Return the A factors (K, rho, q) of the adapters, with nearly orthonormal rows."""
    K, n, q = design.K, design.adapter_rank, design.q
    start = _normal(n, q, generator=generator) / q**0.5
    if design.geometry == "frozen":
        return start.expand(K, n, q)
    own = _normal(K, n, q, generator=generator) / q**0.5
    return own if design.geometry == "own" else (start + 0.3 * own) / 1.09**0.5


def _noise(tails: str, K: int, p: int, q: int, generator: Generator) -> Tensor:
    """Return noise (K, p, q) of expected squared Frobenius norm one (t with 3 degrees of freedom has variance 3)."""
    E = _normal(K, p, q, generator=generator) / (p * q) ** 0.5
    if tails == "normal":
        return E
    shape = (K, p, q) if tails == "entries" else (K, p, 1)
    chi = _normal(3, *shape, generator=generator).square().sum(dim=0)
    return E / chi.sqrt()


def _deviating(attack: Attack, honest: Tensor, U: Tensor, M: Tensor, generator: Generator) -> Tensor:
    """Return what the contaminated clients send (n, p, q) before size and noise, given their honest targets."""
    n, p, q = honest.shape
    r, size = U.shape[1], torch.linalg.matrix_norm(M)
    if attack.kind == "sign_flip":
        return -honest
    if attack.kind == "module":
        step = torch.stack([_step(U, q, generator) for _ in range(1 if attack.together else n)])
        return honest + attack.energy**0.5 * step
    if attack.kind == "population":
        return honest - M + size * _common(p, q, generator)
    if attack.kind == "coalition":
        frame, common = _basis(p, r, generator), size * _common(p, q, generator)
        return common + frame @ _normal(n, r, q, generator=generator) / q**0.5
    other = torch.stack([size * _common(p, q, generator) for _ in range(n)])
    frames = torch.stack([_basis(p, r, generator) for _ in range(n)])
    sent = other + frames @ _normal(n, r, q, generator=generator) / q**0.5
    if attack.kind == "unstructured":
        return sent
    if attack.kind == "weak":
        off = frames @ _normal(n, r, q, generator=generator)
        off = off - U @ (U.T @ off)
        return honest + off * (attack.energy**0.5 / torch.linalg.matrix_norm(off))[:, None, None]
    off = sent - honest
    off = torch.linalg.matrix_norm(off - U @ (U.T @ off))
    return honest + (attack.energy**0.5 / off)[:, None, None] * (sent - honest)


def _step(U: Tensor, q: int, generator: Generator) -> Tensor:
    """Draw a rank-one matrix (p, q) of norm one with its column orthogonal to U."""
    u, v = _normal(len(U), generator=generator), _normal(q, generator=generator)
    u = u - U @ (U.T @ u)
    return torch.outer(u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v))
