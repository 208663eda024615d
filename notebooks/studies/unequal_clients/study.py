"""Unequal clients: false alarms, contamination beside them, attacks in single modules, and what could be seen.

The clients are those of `studies.unequal_clients.clients`, to which the method was not fitted. CLAIR is told nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.linalg.subspace import project_out
from clairlib.recovery.result import CANNOT_TELL, CONTAMINATED
from clairlib.reproduce.sweep import Rows, grid, sweep
from studies.unequal_clients.ablation import RULES, without
from studies.unequal_clients.cases import ALL, FEW, FIRST, NONE, PLACEMENTS, Case, module_attack
from studies.unequal_clients.clients import Attack, Drawn
from studies.unequal_clients.oracle import oracle_flags

KINDS = ("unstructured", "coalition", "sign_flip")
WEAK = ("weak", "towards")
WEAK_BESIDE = "samples 6:1"
FACTORS = (0.5, 1.0, 1.5, 2.0)  # of the smallest deviation that would be found


def flagged(result: ClairResult) -> Tensor:
    """Return the clients (K,) bool whose verdict is that they are contaminated."""
    return torch.tensor([verdict == CONTAMINATED for verdict in result.verdicts])


def squared_errors(updates: Mapping[str, Any], drawn: Drawn) -> Tensor:
    """Return every client's squared error (K,), over all modules."""
    dense = as_dense(updates)
    return torch.stack([(dense[m] - own).square().sum(dim=(1, 2)) for m, own in drawn.targets.items()]).sum(dim=0)


def run_row(drawn: Drawn, result: ClairResult) -> dict[str, Any]:
    """Compare one verdict with the truth; what is not defined is NaN.

    ``ratio`` is the honest clients' summed error over that of their own updates, ``worst`` the largest ratio of one.
    ``other_ratio`` is that of the others, a second population, and ``reported`` says that they are exactly one group.
    ``shown`` is the share of attackers that use a direction of few users in a module that they attack.
    """
    bad, honest, said = ~drawn.benign, drawn.benign, flagged(result)
    local, refined = squared_errors(drawn.updates, drawn), squared_errors(_refined(result), drawn)
    groups = [set(group.members) for group in result.groups]
    few = [k for k, m in drawn.attacked.items() if k in {j for own in result.modules[m].few_users for j in own}]
    return {
        "anybody": bool(said[honest].any()),
        "honest_flagged": float(said[honest].double().mean()),
        "recall": float(said[bad].double().mean()),
        "exact": bool(torch.equal(said, bad)),
        "ratio": float(refined[honest].sum() / local[honest].sum()),
        "worst": float((refined / local)[honest].max()) if honest.any() else float("nan"),
        "other_ratio": float(refined[bad].sum() / local[bad].sum()),
        "reported": groups == [{result.names[k] for k in bad.nonzero()[:, 0].tolist()}],
        "shown": len(few) / len(drawn.attacked) if drawn.attacked else float("nan"),
        "cannot_tell": sum(verdict == CANNOT_TELL for verdict in result.verdicts) / len(said),
    }


def _refined(result: ClairResult) -> dict[str, Any]:
    return {name: module.refined for name, module in result.modules.items()}


def fit_cell(draws: int, start: int, seed: int, **case: Any) -> dict[str, Rows]:
    """Fit ``draws`` draws of a `Case`, from number ``start`` on."""
    own, rows = Case.of(**case), []
    for index in range(start, start + draws):
        drawn = own.draw(seed, index)
        with without(own.without):
            result = CLAIR().fit(drawn.updates)
        rows.append({"draw": index} | run_row(drawn, result))
    return {"runs": rows}


def run_cases(cases: Iterable[tuple[Case, int]], *, batch: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``fit_cell`` for cells with their numbers of draws, at most ``batch`` in one cached file.

    ``how`` goes to ``sweep``, here and in the studies below: cache, jobs.
    """
    cells = [case.parameters | part for case, draws in cases for part in _parts(draws, batch, seed)]
    return sweep(fit_cell, cells, **how)["runs"]


def _parts(draws: int, batch: int, seed: int) -> list[dict[str, int]]:
    return [{"draws": min(batch, draws - start), "start": start, "seed": seed} for start in range(0, draws, batch)]


def honest_study(designs: Mapping[str, int], slow_designs: Mapping[str, int], **how: Any) -> pd.DataFrame:
    """Run honest clients alone: every condition for ``designs``, given with their draws a cell, and ``FEW`` for others.

    The column ``claimed`` leaves out adapters with heavy tails, which are not cut there, or with one large client.
    """
    names = [(designs, ALL), (slow_designs, FEW)]
    cases = [
        (Case(design, condition, Attack("none")), draws)
        for own, conditions in names for design, draws in own.items() for condition in conditions
    ]  # fmt: skip
    runs = run_cases(cases, **how)
    hard = runs.condition.str.startswith(("heavy", "one"))
    return runs.assign(claimed=~(runs.design.str.startswith("LoRA") & hard))


def contaminated_study(conditions: Sequence[str], draws: int, share: float = 0.3, **how: Any) -> pd.DataFrame:
    """Run contaminated clients of every one of ``KINDS`` beside honest ones of every condition."""
    cases = [(Case(condition=c, attack=Attack(kind, share)), draws) for kind in KINDS for c in conditions]
    return run_cases(cases, **how)


def weak_cell(kind: str, energy: float, draws: int, start: int, seed: int) -> dict[str, Rows]:
    """Run weak attackers beside sample sizes of ``WEAK_BESIDE``: verdicts of CLAIR and of the test told everything."""
    case, rows = Case(condition=WEAK_BESIDE, attack=Attack(kind, energy=energy)), []
    for index in range(start, start + draws):
        drawn = case.draw(seed, index)
        for method, said in (("CLAIR", flagged(CLAIR().fit(drawn.updates))), ("told all", oracle_flags(drawn))):
            shares = {"recall": said[~drawn.benign], "honest_flagged": said[drawn.benign]}
            rates = {name: float(own.double().mean()) for name, own in shares.items()}
            rows.append({"draw": index, "method": method} | rates)
    return {"runs": rows}


def weak_study(energies: Sequence[float], *, draws: int, batch: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``weak_cell`` over kinds and energies off the subspace."""
    cells = [cell | part for cell in grid(kind=WEAK, energy=energies) for part in _parts(draws, batch, seed)]
    return sweep(weak_cell, cells, **how)["runs"]


def module_study(designs: Mapping[str, int], times_noise: Mapping[str, Sequence[float]], **how: Any) -> pd.DataFrame:
    """Run attacks in single modules, by ``PLACEMENTS`` and by their norm over that of the noise.

    ``designs`` are given with their draws a cell, ``times_noise`` has the norms of each.
    """
    cells = [(d, n, placement, x) for d, n in designs.items() for placement in PLACEMENTS for x in times_noise[d]]
    runs = run_cases([(Case(d, attack=module_attack(where, x)), n) for d, n, where, x in cells], **how)
    keys = {(where, x): module_key(where, x) for _, _, where, x in cells}
    return runs.merge(pd.DataFrame(list(keys.values())), on=["energy", "count", "apart", "together"])


def module_key(placement: str, times_noise: float) -> dict[str, Any]:
    """Return the columns that tell an attack in single modules, with its name and its norm over the noise's."""
    attack = module_attack(placement, times_noise)
    own = {name: getattr(attack, name) for name in ("energy", "count", "apart", "together")}
    return own | {"placement": placement, "times_noise": times_noise}


def population_study(conditions: Sequence[str], draws: int, share: float = 0.4, **how: Any) -> pd.DataFrame:
    """Run two honest populations with the same subspace and a common part each, in every condition."""
    return run_cases([(Case(condition=c, attack=Attack("population", share)), draws) for c in conditions], **how)


def seen_cell(condition: str, draws: int, start: int, seed: int) -> dict[str, Rows]:
    """Let one honest client deviate by ``FACTORS`` times the smallest deviation that its verdict says would be found.

    The deviation has rank r and is off the subspace. ``smallest`` is in multiples of the client's own size.
    """
    case, rows = Case(FIRST, condition, Attack("none")), []
    for index in range(start, start + draws):
        drawn = case.draw(seed, index)
        ((name, X),) = drawn.updates.items()
        assert isinstance(X, Tensor)
        smallest = float(CLAIR().fit(X).smallest_deviation[0])
        step = deviation(drawn.bases[name], X.shape[2], derive(seed, "seen", condition, index))
        for factor in FACTORS:
            sent = X.clone()
            sent[0] += factor * smallest * torch.linalg.matrix_norm(X[0]) * step
            found = bool(flagged(CLAIR().fit(sent))[0])
            rows.append({"draw": index, "factor": factor, "smallest": smallest, "found": found})
    return {"runs": rows}


def deviation(U: Tensor, q: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix (p, q) of norm one and of the rank of U, with its columns orthogonal to those of U."""
    p, r = U.shape
    left = torch.randn(p, r, generator=generator, dtype=torch.float64)
    off = project_out(U, left @ torch.randn(r, q, generator=generator, dtype=torch.float64))
    return off / torch.linalg.matrix_norm(off)


def seen_study(conditions: Sequence[str], *, draws: int, batch: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``seen_cell`` over conditions."""
    cells = [cell | part for cell in grid(condition=conditions) for part in _parts(draws, batch, seed)]
    return sweep(seen_cell, cells, **how)["runs"]


def unrelated_study(draws: int, **how: Any) -> pd.DataFrame:
    """Run clients that share nothing: each has a subspace and a common part of its own."""
    return run_cases([(Case(attack=Attack("unstructured", share=1.0)), draws)], **how)


def ablation_study(alone: Sequence[str], beside: Sequence[str], draws: int, **how: Any) -> pd.DataFrame:
    """Run honest clients ``alone``, and ``beside`` unstructured contamination, with one rule off at a time.

    Both are lists of conditions.
    """
    attacks = [(Attack("none"), c) for c in alone] + [(Attack("unstructured"), c) for c in beside]
    rules = [NONE, *RULES]
    return run_cases([(Case(FIRST, c, attack, rule), draws) for rule in rules for attack, c in attacks], **how)
