"""CLAIR: recover the shared subspace, find the contaminated clients, refine the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clairlib.consensus import consensus
from clairlib.decompose import Certificate, decompose
from clairlib.detection import Calibration, benign_set, calibrate
from clairlib.factors import Cores, LowRank
from clairlib.frames import (
    LITTLE_STRUCTURE,
    Frame,
    fit_frame,
    floor_energy,
    inside_energy,
    keep_directions,
    leave_one_out,
    log_scores,
    rank_limit,
    shared_structure,
)
from clairlib.refinement import estimate_gain
from clairlib.result import ClairResult, ModuleResult
from clairlib.seeds import derive
from clairlib.starts import robust_half
from clairlib.subspace import project_out, resolved_rank
from clairlib.updates import MINIMUM_CLIENTS, Module, read_modules, read_weights, transpose

NOISE_WEIGHT = 3.0  # nu of the noisy convex program in Frobenius norms of a client's noise: keeps benign S_k at 0


@dataclass(frozen=True)
class _Solved:
    """A module during the fit: its cores, the frame of its clients, and the certificate of the convex program.

    ``X`` are the cores over ``size``, their largest entry, so that no square overflows or vanishes.
    """

    module: Module
    cores: Cores
    size: float
    X: Tensor
    frame: Frame
    certificate: Certificate | None = None


class CLAIR:
    """Collaborative low-rank alignment and identifiable recovery, with nothing known in advance.

    Benign clients follow Theta_k = M + U A_k + H_k: a shared subspace span(U) in which each differs, a common part
    outside it, small heterogeneity H_k. Contaminated clients are arbitrary. The problem and the idea of a structured
    low-rank plus block-sparse decomposition are from the paper's abstract (arXiv:2605.21217); the program's form,
    equations and algorithms are this project's reconstruction.

    Parameters
    ----------
    rank : int, optional
        Dimension r of the shared subspace; estimated per module where None.
    solver : {"consensus", "convex"}
        How the first set of benign clients is found. ``consensus`` grows candidate sets from few clients; ``convex``
        solves the structured low-rank + block-sparse program and attaches its duality gap as certificate. The program
        finds contamination that is larger than the noise of an update; ``consensus`` finds smaller ones too.
    side : {"output", "input"}
        Side of the weight matrix on which the subspace lies: rows p (LoRA B) or columns q (LoRA A).
    seed : int
        Seed of the random sample of client tuples; the result is a function of data and seed alone.
    lam : float, optional
        Weight of the contamination term of the convex program; chosen from its window where None.
    tolerance : float
        Relative duality gap at which the convex program stops.
    """

    def __init__(
        self,
        rank: int | None = None,
        solver: str = "consensus",
        side: str = "output",
        *,
        seed: int = 0,
        lam: float | None = None,
        tolerance: float = 1e-6,
    ) -> None:
        if solver not in ("consensus", "convex"):
            raise ValueError(f"solver must be 'consensus' or 'convex'; got {solver!r}")
        if side not in ("output", "input"):
            raise ValueError(f"side must be 'output' or 'input'; got {side!r}")
        if rank is not None and (not isinstance(rank, int) or rank < 0):
            raise ValueError(f"rank must be a whole number, not negative; got {rank!r}")
        self.rank, self.solver, self.side, self.seed = rank, solver, side, seed
        self.lam, self.tolerance = lam, tolerance

    def fit(
        self,
        updates: Any,
        names: list[str] | None = None,
        weights: Any = None,
        *,
        progress: Callable[[str], None] | None = None,
    ) -> ClairResult:
        """Find the contaminated clients and refine the others.

        Parameters
        ----------
        updates : Tensor or array (K, p, q), or sequence of LowRank, or dict of module name -> either
            One update a client, of any floating dtype; ranks of LowRank may differ. K >= 3.
        names : list of str, optional
            Client names; ``client_0`` .. where None.
        weights : array (K,), optional
            Positive; the noise variance of client k is proportional to 1 / weights[k] (its sample size, say). The
            convex program takes every client alike; weights enter with the frames fitted to its benign clients.
        progress : callable, optional
            Called with each module's name when its subspace is found.

        Raises
        ------
        TypeError, ValueError
            One line that names client and module, for updates that cannot be compared or are not finite.
        """
        modules, clients, by_module = read_modules(updates, names, self.side)
        device = modules[0].reference.device
        w = read_weights(weights, clients).to(device)
        solved = []
        for module in modules:
            solved.append(self._solve(module, w))
            if progress is not None:
                progress(module.name)
        benign, solved, pooled = self._agree(solved, w)
        structure = [float(shared_structure(s.X, w, s.frame)) for s in solved]
        share = max(structure) >= LITTLE_STRUCTURE
        results = {s.module.name: self._module_result(s, w, c, share) for s, c in zip(solved, structure, strict=True)}
        numpy = modules[0].numpy
        out = (lambda t: t.cpu().numpy()) if numpy else (lambda t: t)
        return ClairResult(clients, out(benign), out(pooled.z), out(pooled.p_values), results, by_module)

    def _solve(self, module: Module, weights: Tensor) -> _Solved:
        """First frame of one module, from its clients alone."""
        self._check_rank(module, len(weights))
        cores = module.cores()
        size = float(cores.core.abs().max()) or 1.0
        X = cores.core / size
        if self.solver == "consensus":
            generator = derive(self.seed, "tuples", module.name)
            return _Solved(module, cores, size, X, consensus(X, weights, rank=self.rank, generator=generator))
        members, certificate = self._convex_members(X, size)
        return _Solved(module, cores, size, X, fit_frame(X, weights, members, self.rank), certificate)

    def _check_rank(self, module: Module, K: int) -> None:
        if self.rank is None:
            return
        p, q = module.shape
        largest = min(p, (K - 2) * q)  # the subspace must be found without any one of the clients
        if isinstance(module.updates, list):
            largest = min(largest, sum(update.rank for update in module.updates))
        if self.rank > largest:
            raise ValueError(f"rank {self.rank} is larger than the updates of module {module.name!r} allow, {largest}")

    def _convex_members(self, X: Tensor, size: float) -> tuple[Tensor, Certificate]:
        """Clients without contamination part in the convex program, in its noisy form where the updates are noisy."""
        nu = NOISE_WEIGHT * _noise_norm(X, self.rank)
        solution = decompose(X, lam=self.lam, nu=nu, tolerance=self.tolerance)
        members = ~solution.contaminated
        if int(members.sum()) < MINIMUM_CLIENTS:  # nothing agrees: start from whoever is least contaminated
            order = torch.linalg.matrix_norm(solution.contamination).argsort()
            members = torch.zeros_like(members)
            members[order[:MINIMUM_CLIENTS]] = True
        proof = solution.certificate
        return members, replace(proof, primal=size * proof.primal, dual=size * proof.dual)

    def _agree(self, solved: list[_Solved], weights: Tensor) -> tuple[Tensor, list[_Solved], Calibration]:
        """One set of benign clients for all modules: pool, decide, refit, until the set stays."""
        structure = torch.stack([shared_structure(s.X, weights, s.frame) for s in solved])
        if not bool(structure.any()):  # the clients differ in no module: all count alike
            structure = torch.ones_like(structure)
        votes = sum(c * s.frame.members for c, s in zip(structure, solved, strict=True))
        benign = votes * 2 > structure.sum() if len(solved) > 1 else solved[0].frame.members
        if int(benign.sum()) < MINIMUM_CLIENTS:
            benign = solved[int(structure.argmax())].frame.members
        tried: list[Tensor] = []
        while True:
            solved = [self._refit(s, weights, benign) for s in solved]
            x, variance, inside = _pool(solved, weights, structure)
            pooled = calibrate(x, benign, variance)
            tried.append(benign)
            decided = benign_set(x, benign, pooled.p_values, variance, inside)
            if self.rank is None and not bool(decided.all()):
                decided |= self._benign_at_wider_rank(solved, weights, structure)
            if int(decided.sum()) < MINIMUM_CLIENTS or any(torch.equal(decided, known) for known in tried):
                return benign, solved, pooled
            benign = decided

    def _refit(self, solved: _Solved, weights: Tensor, benign: Tensor) -> _Solved:
        if torch.equal(solved.frame.members, benign):
            return solved
        return replace(solved, frame=fit_frame(solved.X, weights, benign, self.rank))

    def _benign_at_wider_rank(self, solved: list[_Solved], weights: Tensor, structure: Tensor) -> Tensor:
        """Who is benign where the subspace has more directions: one more, and as many as all clients together show.

        A few clients may show fewer directions than they share, and whoever uses the others looks foreign to them. A
        direction too many is one of the noise, and takes next to nothing from the score of a contaminated client.
        """
        wider = [replace(s, frame=_wider(s.X, weights, s.frame)) for s in solved]
        x, variance, inside = _pool(wider, weights, structure)
        members = solved[0].frame.members
        return benign_set(x, members, calibrate(x, members, variance).p_values, variance, inside)

    def _module_result(self, solved: _Solved, weights: Tensor, structure: float, share: bool) -> ModuleResult:
        """Refined where it is estimated to pay; nowhere if the clients ``share`` next to nothing in every module.

        Then differences are as likely each client's own as noise, and the estimate takes them for noise.
        """
        module, cores, frame = solved.module, solved.cores, solved.frame
        benign = frame.members
        x, variance = log_scores(solved.X, weights, frame)
        z = calibrate(x, benign, variance).z
        frame = keep_directions(solved.X, weights, frame) if self.rank is None else frame
        gain = estimate_gain(solved.X, weights, frame)
        basis = cores.lift_rows(frame.basis)
        off = cores.lift(solved.size * project_out(frame.basis, frame.mean))
        is_refined = share and gain.relative > 0
        return ModuleResult(
            name=module.name,
            shape=module.shape[::-1] if module.transposed else module.shape,
            rank=frame.rank,
            basis=module.out(basis),
            common=module.out_update(off),
            scores=z.cpu().numpy() if module.numpy else z,
            refined=_refine(module, basis, off, benign if is_refined else torch.zeros_like(benign)),
            gain=gain.relative,
            gain_terms=gain.scaled(solved.size * solved.size),
            is_refined=is_refined,
            shared_structure=structure,
            spectrum=solved.size * frame.eigenvalues.clamp(min=0.0).sqrt().cpu().numpy(),
            certificate=solved.certificate,
        )


def _wider(X: Tensor, weights: Tensor, frame: Frame) -> Frame:
    """The frame with one more direction, or the rank estimated from all clients, as far as its members support it."""
    everybody = fit_frame(X, weights, torch.ones_like(frame.members))
    seen = min(rank_limit(frame.size, *X.shape[1:]), resolved_rank(frame.eigenvalues))  # beyond, arbitrary directions
    largest = max(frame.rank, seen)
    return fit_frame(X, weights, frame.members, min(max(frame.rank + 1, everybody.rank), largest))


def _pool(solved: list[_Solved], weights: Tensor, structure: Tensor) -> tuple[Tensor, float, Tensor]:
    """Pooled log score of every client (K,), its variance, and the pooled log energy inside the subspaces (K,).

    Averages over modules, weighted by shared structure over noise variance: with one module, that module's. The
    variance takes the modules' noise as independent.
    """
    scored = [log_scores(s.X, weights, s.frame) for s in solved]
    inside = torch.stack([inside_energy(s.X, weights, s.frame).clamp(min=floor_energy(s.X)).log() for s in solved])
    variances = torch.tensor([v for _, v in scored], dtype=structure.dtype, device=structure.device)
    shares = structure / variances
    shares = shares / shares.sum()
    x = shares @ torch.stack([scores for scores, _ in scored])
    return x, float((shares.square() * variances).sum()), shares @ inside


def _refine(module: Module, basis: Tensor, off: LowRank, refine: Tensor) -> Any:
    """P Theta_k + P_perp M for the clients to refine, their own update for the others, in the form of the input."""
    if isinstance(module.updates, Tensor):
        X = module.updates.double()
        refined = torch.where(refine[:, None, None], basis @ (basis.T @ X) + off.dense(), X)
        return module.out(refined.mT if module.transposed else refined)
    adapters: list[LowRank] = []
    for update, wanted in zip(module.updates, refine.tolist(), strict=True):
        if wanted:
            inside = update.scale * (basis.T @ update.B.double()) @ update.A.double()  # (r, q)
            joined = LowRank(torch.cat([basis, off.B], dim=1), torch.cat([inside, off.A]))
            update = LowRank(joined.B.to(update.B.dtype), joined.A.to(update.A.dtype))
            if not bool(update.A.isfinite().all()):
                raise ValueError(f"refined updates of module {module.name!r} overflow {update.A.dtype}")
        adapters.append(transpose(update) if module.transposed else update)
    return adapters


def _noise_norm(X: Tensor, rank: int | None) -> float:
    """Frobenius norm of a benign client's noise: off-subspace residuals of the robust half; 0 below rounding."""
    ones = torch.ones(len(X), dtype=X.dtype, device=X.device)
    frame = fit_frame(X, ones, robust_half(X, ones, rank), rank)
    energy = float(leave_one_out(X, ones, frame)[frame.members].square().sum(dim=(1, 2)).mean())
    return energy**0.5 if energy > floor_energy(X) else 0.0
