"""CLAIR: recover the shared subspace, find the contaminated clients, refine the others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.core.seeds import derive
from clairlib.linalg.compress import FILLED, compress, leads
from clairlib.linalg.grams import stack
from clairlib.linalg.low_rank import cores_of_dense, cores_of_factors
from clairlib.recovery.assembly import Maker
from clairlib.recovery.consensus import consensus
from clairlib.recovery.convex import Certificate, decompose
from clairlib.recovery.detection import Calibration
from clairlib.recovery.frame import Frame, fit_frame, floor_energy
from clairlib.recovery.inputs import Clients, Module, read_clients, where
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE, LeaveOneOut
from clairlib.recovery.module_fit import ModuleFit, Outcome
from clairlib.recovery.oddities import near_duplicates
from clairlib.recovery.power import Verdict, is_anything_shared
from clairlib.recovery.result import ClairResult, result_of, with_set_aside
from clairlib.recovery.start_sets import robust_half
from clairlib.recovery.verdict import ModuleScores, iterate_verdict, vote

# nu of the convex program over the norm of a client's estimation noise: it keeps S_k of benign clients at 0
NOISE_WEIGHT = 3.0
PILOT_MODULES = 8  # largest number of modules in which the first set is searched; all modules then judge this set
AGREED = 3  # after so many modules with the same set, no further pilot module is searched
MAX_SEARCH_CLIENTS = 256  # clients among which the first set is searched; its frame then judges the others


class UntrustedError(ValueError):
    """The clients that are said to be trusted do not agree with one another."""


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
        noise: Any = None, *, adapter_rank: int | None = None, trusted: Sequence[str] | None = None,
        progress: Callable[[str], None] | None = None,
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
        adapter_rank : int, optional
            Rank to which the refined updates are truncated if they are LowRank; each client's own rank if None.
        trusted : sequence of str, optional
            Names of clients known to be honest: the group that holds them is taken for the benign one, also where a
            coalition is larger.
        progress : callable, optional
            Called with the name of each module when its subspace has been found.

        Raises
        ------
        TypeError, ValueError
            One line that names client and module, for updates that cannot be compared or are not finite.
        """
        if adapter_rank is not None and (not isinstance(adapter_rank, int) or adapter_rank < 1):
            raise ValueError(f"adapter_rank must be a whole number, at least 1; got {adapter_rank!r}")
        expected = expected_sq_error if noise is None else noise
        clients = read_clients(updates, names, weights, expected, self.side)
        sent = clients.have_updates()
        kept = clients if bool(sent.all()) else clients.subset(sent)
        result = self._run(kept, kept.marked(trusted or []), adapter_rank, progress)
        return result if kept is clients else with_set_aside(result, clients.names, sent.tolist())

    def _run(
        self, clients: Clients, trusted: Tensor, adapter_rank: int | None, progress: Callable[[str], None] | None
    ) -> ClairResult:
        modules = clients.modules

        def prepared(module: Module, members: Tensor | None = None) -> ModuleFit:
            expected = clients.expected.get(module.name)
            return self.prepare(module, clients.weights, members, expected_sq_error=expected)

        few = pilots(modules, self.solver)
        first = [prepared(module) for module in few]
        known, certificates = self.search(few, first)
        scaled, known, start = self.start(first, known, trusted)
        fits = {fit.name: fit for fit in scaled}

        def fitted(members: Tensor) -> list[ModuleFit]:
            for module in modules:
                if module.name not in fits or not fits[module.name].suits(members):
                    fits[module.name] = prepared(module, members).normalised(known)
            return [fits[module.name] for module in modules]

        benign, pooled = iterate_verdict(start, lambda m: [f.reading(m) for f in fitted(m)], self.wider_frame(scaled))
        own = fitted(benign)
        outcomes = [_told(fit.outcome(benign), fit.name, progress) for fit in own]
        refine_any = max(outcome.structure for outcome in outcomes) >= MIN_EXPLAINED_VARIANCE
        groups = self.groups(scaled, ~benign)
        results, shares = {}, []
        for module, fit, outcome in zip(modules, own, outcomes, strict=True):
            maker = Maker(module, refine_any, adapter_rank, derive(self.seed, "off", module.name))
            its = [prepared(module, group).normalised(group) for group in groups]
            others = [(other, other.outcome(group)) for other, group in zip(its, groups, strict=True)]
            results[module.name], shared = maker.result(fit, outcome, others, certificates.get(module.name))
            shares.append(shared)
        verdict = Verdict.of([fit.reading(benign) for fit in own], benign, pooled)
        form: dict[str, Any] = {"by_module": clients.by_module, "numpy": modules[0].numpy}
        duplicates = near_duplicates(scaled, benign)
        return result_of(clients.names, verdict, results, groups, shares, duplicates, **form)

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

    def start(
        self, fits: Sequence[ModuleFit], known: Tensor, trusted: Tensor
    ) -> tuple[list[ModuleFit], Tensor, Tensor]:
        """Divide the clients of some modules by their sizes, as the first set ``known`` (K,) bool shows them.

        Return the fits, the set from which sizes come, and the set from which the verdict starts: that of a new search
        if anything was divided, or the group that holds the ``trusted`` (K,) bool.
        """
        scaled = [fit.normalised(known) for fit in fits]
        benign, frames = known, list[Frame]()
        if scaled != list(fits) and self.solver == "consensus":
            for fit in scaled:
                frames.append(self._consensus(fit))
                if self.agree(frames):
                    break
            benign = first_set(scaled, frames)
        benign = self.iterate_verdict(scaled, benign)[0]
        if bool(benign[trusted].all()):
            return scaled, known, benign
        for group in self.groups(scaled, ~benign):
            if bool(group[trusted].all()):
                return [fit.normalised(group) for fit in fits], group, group
        raise UntrustedError("the trusted clients are in no group of clients that agree; trust fewer, or check them")

    def groups(self, fits: Sequence[ModuleFit], rest: Tensor) -> list[Tensor]:
        """Return the groups (K,) bool among the clients ``rest`` (K,) bool that share something, as found."""
        found: list[Tensor] = []
        while int(rest.sum()) >= MINIMUM_CLIENTS:
            own = [fit.subset(rest) for fit in fits]
            frames = [self._consensus(fit) for fit in own]
            members, _ = self.iterate_verdict(own, first_set(own, frames))
            if not is_anything_shared([fit.reading(members) for fit in own]):
                break
            group = torch.zeros_like(rest)
            group[rest] = members
            found.append(group)
            rest = rest & ~group
        return found

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
            return self._consensus(fit), None
        members, certificate = self._convex_members(module)
        return fit.frame(members), certificate

    def _consensus(self, fit: ModuleFit) -> Frame:
        generator, K = derive(self.seed, "tuples", fit.name), len(fit.X)
        how: dict[str, Any] = {"rank": self.rank, "shared_block": fit.cores.shared_block, "generator": generator}
        if K <= MAX_SEARCH_CLIENTS:
            return consensus(fit.X, fit.weights, **how)
        crowd = torch.randperm(K, generator=generator)[:MAX_SEARCH_CLIENTS].to(fit.X.device)
        members = torch.zeros(K, dtype=torch.bool, device=fit.X.device)
        members[crowd] = consensus(fit.X[crowd], fit.weights[crowd], **how).members
        return fit.frame(members)

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


def _told(outcome: Outcome, name: str, progress: Callable[[str], None] | None) -> Outcome:
    if progress is not None:
        progress(name)
    return outcome


def _noise_norm(X: Tensor, rank: int | None) -> float:
    """Estimate the norm of a client's noise: the root mean leave-one-out energy of the robust half; 0 if rounding."""
    ones = torch.ones(len(X), dtype=X.dtype, device=X.device)
    frame = fit_frame(X, ones, robust_half(X, ones, rank), rank)
    energy = float(LeaveOneOut(X, ones, frame).benign.R.square().sum(dim=(1, 2)).mean())
    return energy**0.5 if energy > floor_energy(X) else 0.0
