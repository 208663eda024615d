"""CLAIR: recover the shared subspace, find the contaminated clients, refine the others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.core.seeds import derive
from clairlib.linalg.compress import FILLED, compress, leads
from clairlib.linalg.grams import stack
from clairlib.linalg.low_rank import Cores, LowRank, cores_of_dense, cores_of_factors
from clairlib.recovery.consensus import consensus
from clairlib.recovery.convex import Certificate, decompose
from clairlib.recovery.detection import Calibration
from clairlib.recovery.frame import Frame, fit_frame, floor_energy
from clairlib.recovery.inputs import Module, read_expected_errors, read_modules, read_weights, transpose, where
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE, LeaveOneOut
from clairlib.recovery.module_fit import ModuleFit, Outcome
from clairlib.recovery.result import ClairResult, ModuleResult
from clairlib.recovery.start_sets import robust_half
from clairlib.recovery.verdict import ModuleScores, iterate_verdict, vote

# nu of the convex program over the norm of a client's estimation noise: it keeps S_k of benign clients at 0
NOISE_WEIGHT = 3.0
PILOT_MODULES = 8  # largest number of modules in which the first set is searched; all modules then judge this set
AGREED = 3  # after so many modules with the same set, no further pilot module is searched
MAX_SEARCH_CLIENTS = 256  # clients among which the first set is searched; its frame then judges the others


class CLAIR:
    """Collaborative low-rank alignment and identifiable recovery.

    Rank, noise level and number of contaminated clients need not be known. Benign clients follow the model Theta_k = M
    + U A_k + H_k. U spans the shared subspace, in which each client has its own part U A_k. M is common to the benign
    clients, and only its part outside span(U) is identifiable. The heterogeneity H_k is small. Contaminated clients are
    arbitrary. The problem and the idea of a structured low-rank plus block-sparse decomposition are from the paper's
    abstract (arXiv:2605.21217). The program's form, the equations and the algorithms are our reconstruction.

    Parameters
    ----------
    rank : int, optional
        Dimension r of the shared subspace; estimated per module if None.
    solver : {"consensus", "convex"}
        Method that finds the first set of benign clients. ``consensus`` grows candidate sets from a few clients each.
        ``convex`` solves the structured low-rank + block-sparse program and attaches its duality gap as certificate; it
        finds only contamination that is larger than the estimation noise of an update.
    side : {"output", "input"}
        Side of the weight matrix on which the subspace lies: rows p (LoRA B) or columns q (LoRA A).
    seed : int
        Seed of the random client tuples and of randomised linear algebra. The result depends on the data, the
        parameters and this seed only.
    lam : float, optional
        Weight of the contamination term of the convex program; chosen from its window (`lambda_window`) if None.
    tolerance : float
        Relative duality gap at which the convex program stops.
    """

    def __init__(
        self, rank: int | None = None, solver: str = "consensus", side: str = "output", *, seed: int = 0,
        lam: float | None = None, tolerance: float = 1e-6,
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
        self, updates: Any, names: list[str] | None = None, weights: Any = None, expected_sq_error: Any = None,
        noise: Any = None, *, progress: Callable[[str], None] | None = None,
    ) -> ClairResult:
        """Find the contaminated clients and refine the others.

        Parameters
        ----------
        updates : Tensor or array (K, p, q), or sequence of LowRank, or dict of module name -> either
            One update per client, K >= 3, of any floating dtype; the ranks of LowRank may differ.
        names : list of str, optional
            Client names; ``client_0``, ``client_1``, ... if None.
        weights : array (K,), optional
            Positive weights, usually sample sizes: the noise variance of client k is proportional to 1 / weights[k].
            The convex program ignores them; the frames that are fitted to its benign clients use them.
        expected_sq_error : array (K,), or dict of module name -> array, optional
            Expected squared error ||E_k||_F^2 of each update if it is known, e.g. from the standard errors of a
            regression. Differences between benign clients beyond it count as heterogeneity, and refinement is refused
            if averaging them out costs more than it gains. ``noise`` is the old name, until version 0.3.
        progress : callable, optional
            Called with the name of each module when its subspace has been found.

        Raises
        ------
        TypeError, ValueError
            One line that names client and module, for updates that cannot be compared or are not finite.
        """
        modules, clients, by_module = read_modules(updates, names, self.side)
        w = read_weights(weights, clients).to(modules[0].reference.device)
        known = read_expected_errors(expected_sq_error if noise is None else noise, [m.name for m in modules], clients)
        few = pilots(modules, self.solver)
        first = [self.prepare(module, w, expected_sq_error=known.get(module.name)) for module in few]
        known_set, certificates = self.search(few, first)
        scaled = [fit.normalised(known_set) for fit in first]
        benign = known_set if scaled == first else self.search(few, scaled)[0]
        fits = {fit.name: fit for fit in scaled}

        def fitted(members: Tensor) -> list[ModuleFit]:
            for module in modules:
                if module.name not in fits or not fits[module.name].suits(members):
                    fit = self.prepare(module, w, members, expected_sq_error=known.get(module.name))
                    fits[module.name] = fit.normalised(known_set)
            return [fits[module.name] for module in modules]

        start, wider = self.iterate_verdict(scaled, benign)[0], self.wider_frame(scaled)
        benign, pooled = iterate_verdict(start, lambda members: [f.reading(members) for f in fitted(members)], wider)
        outcomes = []
        for fit in fitted(benign):
            outcomes.append(fit.outcome(benign))
            if progress is not None:
                progress(fit.name)
        refine_any = max(outcome.structure for outcome in outcomes) >= MIN_EXPLAINED_VARIANCE
        results = {
            module.name: _module_result(module, fit, outcome, refine_any, certificates.get(module.name))
            for module, fit, outcome in zip(modules, fitted(benign), outcomes, strict=True)
        }
        out = (lambda t: t.cpu().numpy()) if modules[0].numpy else (lambda t: t)
        return ClairResult(clients, out(benign), out(pooled.z), out(pooled.p_values), results, by_module)

    def prepare(
        self, module: Module, weights: Tensor, members: Tensor | None = None, *,
        expected_sq_error: Tensor | None = None, keep: bool = False,
    ) -> ModuleFit:
        """Compute cores; compressed ones suit only sets near ``members`` (K,) bool. ``keep`` stores their factors."""
        self._check_rank(module, len(weights))
        updates = module.updates
        known: dict[str, Any] = {"expected_sq_error": expected_sq_error}
        try:
            if isinstance(updates, Tensor):
                return ModuleFit(module.name, cores_of_dense(updates), weights, self.rank, in_place=True, **known)
            if max(module.shape) <= FILLED:
                return ModuleFit(module.name, cores_of_factors(updates), weights, self.rank, **known)
        except OverflowError as error:
            raise ValueError(f"updates{where(module.name)} are too large: {error}") from None
        stacked = stack(updates)
        generator = derive(self.seed, "compress", module.name)
        cores = compress(stacked, leads(stacked, self.rank, members), members=members, generator=generator)
        kept = stacked if keep else None
        return ModuleFit(module.name, cores, weights, self.rank, compressed_for=members, stacked=kept, **known)

    def search(self, modules: Sequence[Module], fits: Sequence[ModuleFit]) -> tuple[Tensor, dict[str, Certificate]]:
        """Return the first set of benign clients (K,) bool, and the convex program's certificates by module name."""
        frames: list[Frame] = []
        certificates = {}
        for module, fit in zip(modules, fits, strict=True):
            frame, proof = self.first_frame(module, fit)
            frames.append(frame)
            if proof is not None:
                certificates[fit.name] = proof
            if self.agree(frames):
                break
        return first_set(fits, frames), certificates

    def agree(self, frames: Sequence[Frame]) -> bool:
        """Return whether enough modules found the same set; never for the convex program, which is solved in all."""
        same = all(torch.equal(frame.members, frames[0].members) for frame in frames)
        return self.solver == "consensus" and len(frames) == AGREED and same

    def first_frame(self, module: Module, fit: ModuleFit) -> tuple[Frame, Certificate | None]:
        """Return the frame that one module suggests by itself, and the certificate of the convex program, if any."""
        if self.solver == "consensus":
            generator, K = derive(self.seed, "tuples", fit.name), len(fit.X)
            how: dict[str, Any] = {"rank": self.rank, "shared_block": fit.cores.shared_block, "generator": generator}
            if K <= MAX_SEARCH_CLIENTS:
                return consensus(fit.X, fit.weights, **how), None
            crowd = torch.randperm(K, generator=generator)[:MAX_SEARCH_CLIENTS].to(fit.X.device)
            members = torch.zeros(K, dtype=torch.bool, device=fit.X.device)
            members[crowd] = consensus(fit.X[crowd], fit.weights[crowd], **how).members
            return fit.frame(members), None
        members, certificate = self._convex_members(module)
        return fit.frame(members), certificate

    def iterate_verdict(self, fits: Sequence[ModuleFit], benign: Tensor) -> tuple[Tensor, Calibration]:
        """Repeat the verdict of all these modules until the set stays; return the set and the calibration on it."""
        return iterate_verdict(benign, lambda members: [fit.reading(members) for fit in fits], self.wider_frame(fits))

    def wider_frame(self, fits: Sequence[ModuleFit]) -> Callable[[Tensor], list[ModuleScores]] | None:
        """Return a function that scores the clients against wider frames in the `pilots`; None if the rank is given."""
        few = pilots(fits, "consensus")
        return None if self.rank is not None else (lambda members: [fit.wider_reading(members) for fit in few])

    def _check_rank(self, module: Module, K: int) -> None:
        if self.rank is None:
            return
        p, q = module.shape
        largest = min(p, (K - 2) * q)  # leave-one-out: the other clients must suffice to fit the subspace
        if isinstance(module.updates, list):
            largest = min(largest, sum(update.rank for update in module.updates))
        if self.rank > largest:
            raise ValueError(f"rank {self.rank} is larger than the updates of module {module.name!r} allow, {largest}")

    def _convex_members(self, module: Module) -> tuple[Tensor, Certificate]:
        """Return the clients (K,) bool without contamination in the convex program, and its certificate."""
        updates = module.updates
        cores = cores_of_dense(updates) if isinstance(updates, Tensor) else cores_of_factors(updates)
        size = float(cores.core.abs().max()) or 1.0
        X = cores.core / size
        nu = NOISE_WEIGHT * _noise_norm(X, self.rank)
        solution = decompose(X, lam=self.lam, nu=nu, tolerance=self.tolerance)
        members = ~solution.contaminated
        if int(members.sum()) < MINIMUM_CLIENTS:  # no three clients agree: start from the least contaminated ones
            order = torch.linalg.matrix_norm(solution.contamination).argsort()
            members = torch.zeros_like(members)
            members[order[:MINIMUM_CLIENTS]] = True
        proof = solution.certificate
        return members, replace(proof, primal=size * proof.primal, dual=size * proof.dual)


def pilots(fits: Sequence[Any], solver: str) -> list[Any]:
    """Return the modules that are searched: ``PILOT_MODULES`` spread evenly, or all for the convex program."""
    if solver == "convex" or len(fits) <= PILOT_MODULES:
        return list(fits)
    return [fits[i * (len(fits) - 1) // (PILOT_MODULES - 1)] for i in range(PILOT_MODULES)]


def first_set(fits: Sequence[ModuleFit], frames: Sequence[Frame]) -> Tensor:
    """Return the set (K,) bool that most of the searched modules, the first of ``fits``, have found."""
    searched = zip(fits, frames, strict=False)
    return vote(frames, [LeaveOneOut(fit.X, fit.weights, frame).explained_variance for fit, frame in searched])


def _module_result(
    module: Module, fit: ModuleFit, outcome: Outcome, refine_any: bool, certificate: Certificate | None
) -> ModuleResult:
    """Assemble a module's result; ``refine_any`` says whether the clients share a subspace in some module."""
    frame, is_refined = outcome.frame, outcome.is_refined(refine_any)
    if isinstance(fit.cores, Cores):
        basis, off = fit.lifted(frame)
    else:
        shared = fit.shared(frame, fit.stacked or stack(cast(list[LowRank], module.updates)))
        basis, off = shared.lifted_basis(), shared.common_part()
    refine = frame.members if is_refined else torch.zeros_like(frame.members)
    return ModuleResult(
        name=module.name,
        shape=module.shape[::-1] if module.transposed else module.shape,
        rank=frame.rank,
        basis=module.out(basis),
        common_part=module.out_update(off),
        scores=outcome.scores.cpu().numpy() if module.numpy else outcome.scores,
        refined=_refine(module, basis, off, refine, fit.scales),
        gain=outcome.gain.relative,
        gain_terms=outcome.gain.scaled(fit.size * fit.size),
        is_refined=is_refined,
        shared_structure=outcome.structure,
        spectrum=outcome.spectrum.cpu().numpy(),
        certificate=certificate,
    )


def _refine(module: Module, basis: Tensor, off: LowRank, refine: Tensor, scales: Tensor) -> Any:
    """Return P Theta_k + a_k P_perp M for the clients to ``refine``, the others' own updates, in the form of the input."""
    if isinstance(module.updates, Tensor):
        X = module.updates.double()
        refined = torch.where(refine[:, None, None], basis @ (basis.T @ X) + scales[:, None, None] * off.dense(), X)
        return module.out(refined.mT if module.transposed else refined)
    adapters: list[LowRank] = []
    for update, wanted, scale in zip(module.updates, refine.tolist(), scales.tolist(), strict=True):
        if wanted:
            inside = update.scale * (basis.T.double() @ update.B.double()) @ update.A.double()  # (r, q)
            joined = LowRank(torch.cat([basis, off.B], dim=1), torch.cat([inside, scale * off.A]))
            update = LowRank(joined.B.to(update.B.dtype), joined.A.to(update.A.dtype))
            if not bool(update.A.isfinite().all()):
                raise ValueError(f"refined updates of module {module.name!r} overflow {update.A.dtype}")
        adapters.append(transpose(update) if module.transposed else update)
    return adapters


def _noise_norm(X: Tensor, rank: int | None) -> float:
    """Estimate the norm of a client's noise: the root mean leave-one-out energy of the robust half; 0 if rounding."""
    ones = torch.ones(len(X), dtype=X.dtype, device=X.device)
    frame = fit_frame(X, ones, robust_half(X, ones, rank), rank)
    energy = float(LeaveOneOut(X, ones, frame).benign.R.square().sum(dim=(1, 2)).mean())
    return energy**0.5 if energy > floor_energy(X) else 0.0
