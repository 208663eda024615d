"""Label study of notebook 10: clients of a language model that give the same labels different meanings.

A cell is one federation: its adapters are trained, aligned and evaluated. `studies.language_models.tables` summarises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.baselines import AGGREGATORS
from clairlib.linalg.low_rank import as_dense
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.training import Schedule, train_adapters
from studies.common.rules import OWN, STOPPED, TOLD_RANK, Held, is_common, oracle_updates, server_updates
from studies.common.verdicts import angle_rows, verdict_row
from studies.language_models.bases import LanguageBase
from studies.language_models.clients import TRIGGER, Client, Federation, client_data, make_federation, weights_of
from studies.language_models.evaluation import Evaluator
from studies.language_models.settings import SETTINGS, Setting, base_of, parts
from studies.language_models.texts import Texts

Updates = Mapping[str, Tensor]  # module name -> (K, p, q)
Trained = dict[str, dict[str, Any]]  # client name -> module name -> LowRank

LEFT_OUT = ("entrywise RPCA", "entrywise RPCA, personal")  # they take minutes per module of the encoder
RULES = [name for name in AGGREGATORS if name not in LEFT_OUT]
GROUP_TOKENS = 2048  # tokens per forward pass; each label needs as many logits as the vocabulary is large
SPECTRUM = 12  # number of singular values that are kept


@dataclass(frozen=True)
class Sizes:
    """Sizes of a federation.

    ``clients`` is K, ``contaminated`` the number of contaminated clients, ``examples`` the number of examples per
    client. ``public`` is the number of texts per class for a base of ``MADE_HERE``.
    """

    clients: int
    contaminated: int
    examples: int
    public: int


@dataclass(frozen=True)
class Run:
    """One trained federation and its test texts.

    ``updates``: module name -> K adapters. ``stopped``: the same, but honest clients train on four fifths of their
    examples, and the other fifth decides when they stop.
    """

    base: LanguageBase
    federation: Federation
    updates: dict[str, list[Any]]
    stopped: dict[str, list[Any]]
    test: Texts
    device: str


def language_cell(
    setting: str, kind: str, seed: int, cache: str, device: str, **sizes: int
) -> dict[str, Rows]:
    """Run one federation: every method's accuracy on the benign clients, CLAIR's verdict, and shared structure.

    ``sizes``: the attributes of `Sizes`.
    """
    how = SETTINGS[setting]
    run = trained_run(how, kind, seed, Sizes(**sizes), Path(cache), device)
    result = CLAIR().fit(run.updates, names=[client.name for client in run.federation.clients])
    methods, judge = _methods(run, result, how.rank), judge_of(run, run.test.texts)
    tables = {"accuracy": accuracy_rows(run, judge, methods), "verdicts": [judged(result, run.federation.benign)]}
    tables |= structure_rows(result, as_dense(run.updates), run.federation.benign, how.rank, seed)
    if kind == "backdoor":
        tables["backdoor"] = backdoor_rows(run, methods)
    return tables


def trained_run(how: Setting, kind: str, seed: int, sizes: Sizes, cache: Path, device: str = "cpu") -> Run:
    """Train clients, some with one kind of contamination, and return their adapters."""
    base, federation = base_of(how, sizes.public, cache), _federation(how, kind, seed, sizes, cache)
    own, stopped = honest_adapters(how, seed, sizes, cache, device)
    bad = [client for client in federation.clients if client.contaminated]
    own, names = own | _train(bad, how, seed, sizes, cache, device), [client.name for client in federation.clients]
    everybody = [{name: trained[name] for name in names} for trained in (own, own | stopped)]
    modules = [{module: [u[module] for u in each.values()] for module in own[names[0]]} for each in everybody]
    return Run(base, federation, modules[0], modules[1], parts(how.texts, sizes.public)[1], device)


def _federation(how: Setting, kind: str, seed: int, sizes: Sizes, cache: Path) -> Federation:
    classes, labels = len(parts(how.texts, sizes.public)[1].names), len(base_of(how, sizes.public, cache).labels)
    return make_federation(
        sizes.clients, sizes.contaminated, classes=classes, labels=labels, seed=seed, kind=kind, shared=how.shared
    )


@lru_cache(maxsize=1)
def honest_adapters(how: Setting, seed: int, sizes: Sizes, cache: Path, device: str) -> tuple[Trained, Trained]:
    """Train the benign clients, which do not depend on the contamination.

    The first result is trained on all examples. The second holds out a fifth of them for early stopping.
    """
    clients = [c for c in _federation(how, "shuffled", seed, sizes, cache).clients if not c.contaminated]
    full, stopped = (
        _train(clients, how, seed, sizes, cache, device, held_out) for held_out in (0, sizes.examples // 5)
    )
    return full, stopped


def _train(
    clients: Sequence[Client], how: Setting, seed: int, sizes: Sizes, cache: Path, device: str, held_out: int = 0
) -> Trained:
    """Train clients; return client name -> adapters by module."""
    base, pool = base_of(how, sizes.public, cache), parts(how.texts, sizes.public)[2]
    data = [client_data(base, client, pool, sizes.examples, seed=seed, held_out=held_out) for client in clients]
    schedule = Schedule(steps=how.steps, learning_rate=how.learning_rate, check_every=5)
    job: dict[str, Any] = {"seed": seed, "device": device, "group_tokens": GROUP_TOKENS}
    trained = train_adapters(base.model, data, list(how.targets), schedule, **job) if data else []
    if lost := [client.name for client in trained if client.status == "diverged"]:
        raise RuntimeError(f"client {lost[0]!r} diverged; lower the learning rate of its setting")
    return {client.name: dict(client.updates) for client in trained}


def _methods(run: Run, result: ClairResult, rank: int) -> dict[str, Held]:
    benign, dense = run.federation.benign, as_dense(run.updates)
    methods = server_updates(run.updates, benign, rank, RULES) | {STOPPED: run.stopped, "CLAIR": result.refined}
    return methods | {TOLD_RANK: oracle_updates(dense, benign, rank)}


def judge_of(run: Run, texts: Sequence[str]) -> Evaluator:
    """Return an evaluator of the run's model on these texts."""
    examples = [run.base.example(text, 0) for text in texts]
    how: dict[str, Any] = {"device": run.device, "group_tokens": GROUP_TOKENS}
    return Evaluator(run.base.model, examples, list(run.updates), run.base.outputs, **how)


def answers_to(judge: Evaluator, updates: Mapping[str, Any], chosen: Sequence[int], same: bool) -> Tensor:
    """Return the labels (n, N) that the chosen clients' models give; with ``same`` all hold the first one's update."""
    own = {name: [each[k] for k in (chosen[:1] if same else chosen)] for name, each in updates.items()}
    answers = judge.answers(as_dense(own))
    return answers.expand(len(chosen), -1)


def accuracy_rows(run: Run, judge: Evaluator, methods: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Measure every benign client's accuracy under every method, with its own frequencies of classes.

    All clients are evaluated on the same texts, each by its own labels; texts are weighted by the client's class
    frequencies. ``on_shared`` is the accuracy on the classes that benign clients reword.
    """
    classes, clients = torch.tensor(list(run.test.classes)), run.federation.clients
    benign = [k for k, client in enumerate(clients) if not client.contaminated]
    shared, rows = torch.isin(classes, run.federation.shared), []
    for method, updates in methods.items():
        answers = answers_to(judge, updates, benign, is_common(method))
        for k, given in zip(benign, answers, strict=True):
            right = given == clients[k].behaviour.wording[classes]
            accuracy = float(right.double() @ weights_of(clients[k], classes))
            row = {"client": clients[k].name, "method": method, "accuracy": accuracy}
            rows.append(row | {"on_shared": float(right[shared].double().mean())})
    return rows


def judged(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    """Compare CLAIR's verdict with the truth, and add whether it refined any module."""
    return verdict_row(result, benign) | {"refined": any(module.is_refined for module in result.modules.values())}


def structure_rows(result: ClairResult, dense: Updates, benign: Tensor, rank: int, seed: int) -> dict[str, Rows]:
    """Measure every module's shared structure, the spectrum of the clients that CLAIR keeps, and angles."""
    tables: dict[str, Rows] = {"structure": [], "spectrum": [], "angles": []}
    for name, module in result.modules.items():
        own = {"module": short_name(name)}
        facts = {"shared_structure": module.shared_structure, "rank": module.rank, "refined": module.is_refined}
        tables["structure"].append(own | facts | {"estimated_gain": module.gain})
        values = module.spectrum[:SPECTRUM] / module.spectrum[0]
        tables["spectrum"] += [own | {"direction": i + 1, "value": float(v)} for i, v in enumerate(values)]
        tables["angles"] += [own | row for row in angle_rows(dense[name], benign, rank, seed=seed)]
    return tables


def short_name(module: str) -> str:
    """Return a module's name from its layer on."""
    return module[module.index("layer") :] if "layer" in module else module


def backdoor_rows(run: Run, methods: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Measure how often texts with the trigger get the backdoor's answer.

    Benign clients are measured under every method, contaminated clients under their own update.
    """
    clients, classes = run.federation.clients, torch.tensor(list(run.test.classes))
    (answer,) = {client.behaviour.answer for client in clients if client.contaminated}
    judge = judge_of(run, [f"{TRIGGER} {text}" for text in run.test.texts])
    rows, benign = [], [k for k, client in enumerate(clients) if not client.contaminated]
    bad = [k for k in range(len(clients)) if k not in benign]
    cases = [(method, updates, benign) for method, updates in methods.items()] + [(OWN, methods["local"], bad)]
    for method, updates, chosen in cases:
        answers = answers_to(judge, updates, chosen, is_common(method))
        for k, given in zip(chosen, answers, strict=True):
            counted = clients[k].behaviour.wording[classes] != answer  # for other texts the answer is right
            success = float((given[counted] == answer).double().mean())
            rows.append({"method": method, "client": clients[k].name, "success": success})
    return rows


def language_study(
    settings: Iterable[str],
    kinds: Iterable[str],
    seeds: int,
    sizes: Sizes,
    *,
    seed: int = 0,
    cache: Path,
    device: str = "cpu",
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run `language_cell` for settings and kinds of contamination over seeds; return its tables.

    Cells of one seed are adjacent, because they use the same honest clients.
    """
    settings, kinds = list(settings), list(kinds)
    for name in settings:
        base_of(SETTINGS[name], sizes.public, cache)  # trained once, before worker processes need it
    cells = [
        {"setting": name, "seed": s, "kind": kind, **asdict(sizes)}
        for name in settings
        for s in range(seed, seed + seeds)
        for kind in kinds
    ]
    return sweep(language_cell, cells, shared={"cache": str(cache), "device": device}, cache=cache, jobs=jobs)
