"""Results of CLAIR: a verdict for every client, and the subspace and the refined updates of every module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clairlib.linalg.low_rank import LowRank
from clairlib.recovery.convex import Certificate
from clairlib.recovery.detection import FAMILY_ERROR
from clairlib.recovery.inputs import SINGLE
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.refinement import Gain

if TYPE_CHECKING:
    from clairlib.recovery.power import Verdict


ALL = BENIGN, CONTAMINATED, CANNOT_TELL = "benign", "contaminated", "cannot tell"


@dataclass(frozen=True)
class ModuleSummary:
    """Results of one weight matrix, without the updates themselves.

    ``shape`` is (p, q) and ``rank`` is r. ``scores`` (K,) are as in ClairResult, but of this module alone; ``p_values``
    (K,) are those of its own verdict, for which suspects do not shape the subspace. ``sizes`` (K,) are the a_k by which
    clients were divided. ``gain`` is the estimated fraction of the local squared error that refinement removes,
    ``gain_terms`` its parts. ``is_refined`` is False if clients keep their own updates: the gain is not positive, or no
    module has a shared subspace. ``shared_structure``, in [0, 1], is the explained variance of the benign clients by
    leave-one-out prediction, beyond chance. ``spectrum`` holds the singular values of the benign clients' centred
    stack; the rank shows as a drop in it. ``few_users`` lists the clients (indices) of each direction of the subspace
    that few clients use: a backdoor of several clients looks like this, and so does an honest minority.
    ``certificate`` is that of the convex program, if solved.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scores: Any
    p_values: Any
    sizes: Any
    gain: float
    gain_terms: Gain
    is_refined: bool
    shared_structure: float
    spectrum: np.ndarray
    few_users: list[list[int]]
    certificate: Certificate | None


@dataclass(frozen=True)
class ModuleResult(ModuleSummary):
    """Results of one weight matrix, with its subspace and the refined updates.

    ``basis`` U (p, r), or (q, r) for side "input", is unique up to rotation; compare with ``subspace.sin_theta``.
    ``common_part`` is P_perp M (p, q). ``refined`` has the form of the input, with a contaminated client's own update.
    As LowRank it has the rank asked for, balanced factors and scale 1. ``truncation_errors`` (K,) are the relative
    Frobenius errors of that, 0 for dense and for own updates. Before truncation it is U U' Theta_k + a_k
    ``common_part`` (side "input": Theta_k U U' + a_k ``common_part``), a_k of ``sizes``; `linalg.refined_factors.exact_update` joins these factors.
    """

    basis: Any
    common_part: Any
    refined: Any
    truncation_errors: Any


def _of_modules(name: str, meaning: str) -> property:
    """Make a property that reads a field of the module, or a dict of it if the updates were given by module."""

    def read(result: ClairResult) -> Any:
        if result.by_module:
            return {m: getattr(module, name) for m, module in result.modules.items()}
        return getattr(result.modules[SINGLE], name)

    return property(read, doc=meaning)


@dataclass(frozen=True)
class Group:
    """Clients that agree with one another but not with the benign clients: another honest population, or a coalition.

    ``subspace`` and ``common_part`` say by module what the group shares with the benign clients: ||U' V||_F^2 / min(r,
    r') of the two bases (r / p by chance), and the cosine of the common parts off the subspaces. Groups of at least
    four are refined within themselves. Both are empty if only the verdict was computed.
    """

    members: list[str]
    subspace: dict[str, float]
    common_part: dict[str, float]

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)


@dataclass(frozen=True)
class ClairResult:
    """Verdict over all modules, and the results of each module.

    ``benign`` (K,) bool are the clients of the largest group that agrees, or of the one that holds the trusted clients:
    those from which subspace and common part are computed. ``verdicts`` says what is known of each client; contaminated
    means that a client does not share this subspace and common part, not that it is malicious.

    ``scores`` (K,) say how far each client stands above the benign ones, in standard deviations of their log
    leave-one-out energy off the subspace. ``p_values`` (K,) are the chance that a benign client scores as high. The
    nominal family-wise error is 1 % if no client is contaminated, and again 1 % over clients and modules for the
    verdicts of single modules (`found_in`). Clients may differ in size and in noise, within limits (docs/limits.md).
    ``smallest_deviation`` (K,) is the deviation that would have been found half of the time, in multiples of the
    client's own size; ``is_shared`` whether the benign clients share anything. ``set_aside`` are clients with a zero
    update: benign is False, their scores are NaN. ``groups`` are further groups that agree, ``duplicates`` pairs of
    clients with nearly the same update. ``modules`` holds a `ModuleResult` by name, or a `ModuleSummary` if the refined
    updates are on disk.

    ``rank``, ``basis``, ``common_part``, ``refined``, ``gain``, ``shared_structure`` and ``certificate`` are those of
    the module, or dicts if the updates were given by module.
    """

    names: list[str]
    benign: Any
    scores: Any
    p_values: Any
    modules: dict[str, Any]
    by_module: bool
    smallest_deviation: Any
    is_shared: bool
    groups: list[Group]
    duplicates: list[tuple[str, str]]
    set_aside: list[str]

    rank = _of_modules("rank", "Rank r of the shared subspace.")
    basis = _of_modules("basis", "Orthonormal basis U (p, r) of the shared subspace.")
    common_part = _of_modules("common_part", "Common part outside the subspace, P_perp M (p, q).")
    common = _of_modules("common_part", "Old name of ``common_part``; it will be removed in version 0.3.")
    refined = _of_modules("refined", "Refined updates, in the form of the input; contaminated clients hold their own.")
    truncation_errors = _of_modules("truncation_errors", "Relative Frobenius errors (K,) of the refined updates' rank.")
    gain = _of_modules("gain", "Estimated fraction of the local squared error that refinement removes.")
    shared_structure = _of_modules("shared_structure", "Explained variance of benign clients, see `ModuleSummary`.")
    certificate = _of_modules("certificate", "Duality gap of the convex program; None for the consensus solver.")

    @property
    def verdicts(self) -> list[str]:
        """Verdict on each client: benign, contaminated or cannot tell.

        Nothing can be told of a client with a zero update, of anybody if the clients share nothing, and of a client
        that could have deviated by more than its own size without being found.
        """
        seen = [self.is_shared and value <= 1 for value in self.smallest_deviation.tolist()]
        return [
            CANNOT_TELL if name in self.set_aside or not self.is_shared or (ok and not found) else
            BENIGN if ok else CONTAMINATED
            for name, ok, found in zip(self.names, self.benign.tolist(), seen, strict=True)
        ]  # fmt: skip

    @property
    def contaminated(self) -> list[str]:
        """Names of the contaminated clients."""
        return [name for name, verdict in zip(self.names, self.verdicts, strict=True) if verdict == CONTAMINATED]

    @property
    def found_in(self) -> dict[str, list[str]]:
        """Modules that by themselves find a client contaminated, by the client's name; empty if there is one module."""
        if len(self.modules) == 1:
            return {}
        level = FAMILY_ERROR / (len(self.names) * len(self.modules))
        found = {name: module.p_values <= level for name, module in self.modules.items()}
        by_client = {client: [m for m, own in found.items() if own[k]] for k, client in enumerate(self.names)}
        return {client: own for client, own in by_client.items() if own}

    @property
    def has_shared_subspace(self) -> bool:
        """Whether the explained variance reaches ``MIN_EXPLAINED_VARIANCE`` in any module."""
        return max(module.shared_structure for module in self.modules.values()) >= MIN_EXPLAINED_VARIANCE

    def summary(self) -> str:
        """Return the verdict and the modules as plain text."""
        bad = self.contaminated
        lines = [f"{len(bad)} of {len(self.names)} clients contaminated" + (f": {', '.join(bad)}" if bad else "")]
        if not self.is_shared:
            lines.append("nothing shared found: the updates do not predict one another, so nothing can be told")
        width = max(len(name) for name in self.names)
        lines.append(f"{'client':<{width}}  verdict       score  p-value  seen from")
        columns = self.scores.tolist(), self.p_values.tolist(), self.smallest_deviation.tolist()
        for name, verdict, score, p, c in zip(self.names, self.verdicts, *columns, strict=True):
            lines.append(f"{name:<{width}}  {verdict:<12}  {score:5.1f}  {p:7.2g}  {c:.2g} x")
        lines += [_of_module(module) for module in self.modules.values()]
        return "\n".join([*lines, *self.remarks()])

    def remarks(self) -> list[str]:
        """Return what else should be known of the clients, a line each; empty if there is nothing."""
        lines = [f"{name}: zero update, set aside" for name in self.set_aside]
        lines += [f"{name}: found in {', '.join(found)}" for name, found in self.found_in.items()]
        for group in self.groups:
            shares = [f"{name} {own:.0%}" for name, own in group.subspace.items()]
            what = f"; of the benign subspace it shares {', '.join(shares)}" if shares else ""
            lines.append(f"group of {group.size} that agree with one another: {', '.join(group.members)}{what}")
        lines += [f"{first} and {second} sent nearly the same update" for first, second in self.duplicates]
        for module in self.modules.values():
            for few in module.few_users:
                users = ", ".join(self.names[k] for k in few)
                lines.append(f"{module.name}: a direction of the subspace is used by few clients: {users}")
        return lines


def _of_module(module: ModuleSummary) -> str:
    found = f"rank {module.rank}, shared structure {module.shared_structure:.2f}"
    refused = "" if module.is_refined else "not refined, "
    line = f"{module.name} {module.shape[0]}x{module.shape[1]}: {found}, {refused}estimated gain {module.gain:.0%}"
    proof = module.certificate
    return line if proof is None else f"{line}\n  duality gap {proof.relative_gap:.1e} ({proof.iterations} iterations)"


def result_of(
    names: list[str], verdict: Verdict, modules: dict[str, Any], groups: Sequence[Tensor], shares: Sequence[Any],
    duplicates: Sequence[tuple[int, int]], *, by_module: bool = True, numpy: bool = False,
) -> ClairResult:  # fmt: skip
    """Assemble the result; ``groups`` (K,) bool, and by module the list of what each shares, empty if not known."""
    told = [
        Group(
            [names[k] for k in group.nonzero()[:, 0].tolist()],
            {name: own[i].subspace for name, own in zip(modules, shares, strict=bool(shares))},
            {name: own[i].common_part for name, own in zip(modules, shares, strict=bool(shares))},
        )
        for i, group in enumerate(groups)
    ]
    arrays = verdict.benign, verdict.scores, verdict.p_values
    benign, scores, p_values, seen = (t.cpu().numpy() if numpy else t for t in (*arrays, verdict.smallest_deviation))
    pairs = [(names[j], names[k]) for j, k in duplicates]
    return ClairResult(
        names, benign, scores, p_values, modules, by_module, seen, verdict.is_shared, told, pairs, []
    )


def with_set_aside(result: ClairResult, names: list[str], kept: list[bool]) -> ClairResult:
    """Return the result for all clients of these ``names``, given that of those ``kept``; the others sent zeros."""
    places = [k for k, ok in enumerate(kept) if ok]

    def spread(values: Any, missing: float) -> Any:
        numpy = isinstance(values, np.ndarray)
        whole = np.full(len(kept), missing, dtype=values.dtype) if numpy else values.new_full((len(kept),), missing)
        whole[places] = values
        return whole

    def module(own: Any) -> Any:
        few = [[places[k] for k in users] for users in own.few_users]
        nan = {name: spread(getattr(own, name), float("nan")) for name in ("scores", "p_values", "sizes")}
        own = replace(own, few_users=few, **nan)
        if not isinstance(own, ModuleResult):
            return own
        errors = spread(own.truncation_errors, 0.0)
        return replace(own, refined=_with_zeros(own.refined, kept), truncation_errors=errors)

    nan = {name: spread(getattr(result, name), float("nan")) for name in ("scores", "p_values", "smallest_deviation")}
    return replace(
        result, names=names, benign=spread(result.benign, False), **nan,
        modules={name: module(own) for name, own in result.modules.items()},
        set_aside=[name for name, ok in zip(names, kept, strict=True) if not ok],
    )  # fmt: skip


def _with_zeros(refined: Any, kept: list[bool]) -> Any:
    """Return refined updates in the same form, with zeros in the places of the clients that are not ``kept``."""
    if isinstance(refined, list):
        left, first = iter(refined), refined[0]
        zero = LowRank(torch.zeros_like(first.B), torch.zeros_like(first.A))
        return [next(left) if ok else zero for ok in kept]
    shape = (len(kept), *refined.shape[1:])
    whole = np.zeros(shape, refined.dtype) if isinstance(refined, np.ndarray) else refined.new_zeros(shape)
    whole[[k for k, ok in enumerate(kept) if ok]] = refined
    return whole
