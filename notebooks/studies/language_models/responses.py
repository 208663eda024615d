"""Responses of several tokens in place of labels: clients with instructions of different categories.

Every client has one main category. Benign clients learn the response to an instruction; contaminated ones have their
responses dealt out at random among their own instructions. One federation is a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.training import ClientData, Schedule, train_adapters
from studies.common.federation import draw_names
from studies.common.rules import TOLD_RANK, is_common, oracle_updates, server_updates
from studies.common.verdicts import wrong_sides
from studies.language_models.bases import LanguageBase, load_base
from studies.language_models.clients import (
    ALPHA,
    RANK,
    Client,
    ClientBehaviour,
    Federation,
    class_probs_of,
    draw_places,
    split_texts,
    weights_of,
)
from studies.language_models.evaluation import Evaluator
from studies.language_models.labels import GROUP_TOKENS, judged, structure_rows
from studies.language_models.pairs import PUBLIC, Pairs, docstrings, examples_of, fitting, load_pairs
from studies.language_models.settings import WRITERS, made_folder
from studies.language_models.tables import PROPER
from studies.language_models.tiny_models import train_tiny_on_pairs

DOCSTRINGS, TINY = "docstrings", "tiny Llama"
KIND = "shuffled responses"
RULES = ("local", "FedAvg", "FedAvg, benign only", "coordinate median", "trimmed mean", "MultiKrum", "geometric median")
TOLD_RANKS = (1, 4, 16)


@dataclass(frozen=True)
class ResponseSetting:
    """A base model, its pairs, and how clients train.

    Attributes
    ----------
    base : str
        ``TINY``, a folder, or a name on the hub.
    pairs : str
        ``DOCSTRINGS``, or a source of `load_pairs`.
    targets : tuple of str
    learning_rate, steps, batch
        Of AdamW.
    length : int
        Most tokens of a pair; longer ones are left out.
    test : int
        Pairs of every category that clients are judged on.
    """

    base: str
    pairs: str
    targets: tuple[str, ...]
    learning_rate: float
    steps: int
    batch: int
    length: int
    test: int = 20


@dataclass(frozen=True)
class ResponseSizes:
    """K clients, how many of them contaminated, the pairs of each; steps for which a base made here is trained."""

    clients: int
    contaminated: int
    pairs: int
    base_steps: int


def _dolly(base: str, layers: int) -> ResponseSetting:
    """A causal model of the hub on Dolly's eight categories; the writers of its last layer."""
    targets = tuple(f"layers.{layers - 1}.{name}" for name in WRITERS)
    return ResponseSetting(base, "databricks/databricks-dolly-15k", targets, 1e-3, steps=60, batch=16, length=256)


RESPONSE_SETTINGS = {
    "tiny Llama, docstrings": ResponseSetting(
        TINY, DOCSTRINGS, tuple(f"layers.1.{name}" for name in WRITERS), 5e-3, steps=40, batch=16, length=64
    ),
    "SmolLM2-135M, Dolly": _dolly("HuggingFaceTB/SmolLM2-135M", layers=30),
    "SmolLM2-360M, Dolly": _dolly("HuggingFaceTB/SmolLM2-360M", layers=32),
    "Qwen2.5-0.5B, Dolly": _dolly("Qwen/Qwen2.5-0.5B", layers=24),
}


@lru_cache(maxsize=1)
def material(how: ResponseSetting, base_steps: int, cache: Path) -> tuple[LanguageBase, Pairs, Pairs]:
    """The base, the pairs to judge with, as many of every category, and the clients' pool; all fit the length."""
    base: str | Path = how.base
    if how.base == TINY:
        make = partial(_make_tiny, base_steps, how.length)
        base = made_folder(f"{TINY}, {how.length} tokens", base_steps, make, cache)
    model = load_base(base, (), length=how.length)
    pairs = docstrings() if how.pairs == DOCSTRINGS else load_pairs(how.pairs)
    test, pool = split_texts(fitting(pairs, model.tokenizer, how.length)[0], [how.test, -1], seed=0)
    return model, test, pool


def _make_tiny(steps: int, length: int, folder: Path) -> None:
    train_tiny_on_pairs(docstrings(PUBLIC), folder, steps=steps, length=length)


def make_mixed(clients: int, contaminated: int, categories: int, *, seed: int) -> Federation:
    """Clients each with a main category, dealt in turn, and a share of every other; who is contaminated is drawn."""
    names, bad = draw_names(clients, contaminated, seed=seed)
    order = torch.randperm(categories, generator=derive(seed, "categories"))
    members = []
    for k, name in enumerate(names):
        main = order[k % categories][None]
        behaviour = ClientBehaviour(torch.arange(categories), main, shuffled=name in bad)
        class_probs = class_probs_of(main, categories, derive(seed, name, "conduct"))
        members.append(Client(name, name in bad, behaviour, class_probs))
    return Federation(torch.arange(0), members)  # no labels, so none that are shared


def pairs_of(client: Client, pool: Pairs, count: int, *, seed: int) -> Pairs:
    """A client's own pairs; of a contaminated one the responses are dealt out at random among its instructions."""
    draws = derive(seed, client.name, "pairs")
    own = pool.take(draw_places(client, pool, count, draws).tolist())
    if not client.behaviour.shuffled:
        return own
    order = torch.randperm(count, generator=draws).tolist()
    return Pairs(own.texts, own.classes, own.names, own.take(order).responses)


def train_clients(
    how: ResponseSetting, base: LanguageBase, pairs: Mapping[str, Pairs], *, seed: int, device: str
) -> dict[str, list[Any]]:
    """Adapters of every target, one a client, each trained on its own pairs; ``pairs``: client's name -> its pairs."""
    data = [
        ClientData(name, examples_of(own, base.tokenizer, how.length), RANK, ALPHA) for name, own in pairs.items()
    ]
    schedule = Schedule(how.steps, how.batch, learning_rate=how.learning_rate)
    job: dict[str, Any] = {"seed": seed, "device": device, "group_tokens": GROUP_TOKENS}
    trained = train_adapters(base.model, data, list(how.targets), schedule, **job)
    if lost := [client.name for client in trained if client.status == "diverged"]:
        raise RuntimeError(f"client {lost[0]!r} diverged; lower the learning rate of its setting")
    return {module: [client.updates[module] for client in trained] for module in trained[0].updates}


def response_cell(setting: str, seed: int, cache: str, device: str, **sizes: int) -> dict[str, Rows]:
    """One federation: what every method gives the benign clients, CLAIR's verdict, and what the updates share.

    Tables: ``responses`` (client, category, method, loss, predicted) of the benign clients, ``contaminated`` the same
    of the others with the base, with what they send, and had they not shuffled, ``verdicts`` (`judged`, and
    missed, false_alarms, told_rank), and those of `structure_rows`. ``sizes``: the attributes of `ResponseSizes`.
    """
    how, size = RESPONSE_SETTINGS[setting], ResponseSizes(**sizes)
    base, test, pool = material(how, size.base_steps, Path(cache))
    federation = make_mixed(size.clients, size.contaminated, len(test.names), seed=seed)

    def train(clients: Sequence[Client]) -> dict[str, list[Any]]:
        pairs = {client.name: pairs_of(client, pool, size.pairs, seed=seed) for client in clients}
        return train_clients(how, base, pairs, seed=seed, device=device)

    local = train(federation.clients)
    result = CLAIR().fit(local, names=[client.name for client in federation.clients])
    asked = Questions(base, test, federation, list(local), device)
    methods = server_updates(local, federation.benign, rules=RULES) | {"CLAIR": result.refined}
    rows = [row for method, updates in methods.items() for row in asked.rows(method, updates)]
    others = asked.others(methods, train)
    told, rank = asked.told(as_dense(local))
    verdict = judged(result, federation.benign) | wrong_sides(result, federation.benign) | {"told_rank": rank}
    structure = structure_rows(result, as_dense(local), federation.benign, RANK, seed)
    return {"responses": rows + told, "contaminated": others, "verdicts": [verdict]} | structure


class Questions:
    """The held-out pairs, and how clients answer them under an update, each on its own categories."""

    def __init__(
        self, base: LanguageBase, test: Pairs, federation: Federation, targets: Sequence[str], device: str
    ) -> None:
        examples = examples_of(test, base.tokenizer, base.length)
        self.judge = Evaluator(base.model, examples, targets, device=device, group_tokens=GROUP_TOKENS)
        self.federation, self.test = federation, test
        lengths = torch.from_numpy(self.judge.plan.table.labelled)
        classes = torch.tensor(list(test.classes))
        own = [weights_of(client, classes).repeat_interleave(lengths) for client in federation.clients]
        self.weights = torch.stack([w / w.sum() for w in own])  # (K, N): of every response token for each client

    def rows(self, method: str, updates: Mapping[str, Any], benign: bool = True) -> Rows:
        """Loss per response token and share of response tokens predicted, for every benign client, or every other."""
        members = torch.where(self.federation.benign == benign)[0].tolist()
        chosen = members[:1] if is_common(method) else members
        found = self.judge.predictions(as_dense({name: [own[k] for k in chosen] for name, own in updates.items()}))
        means = torch.einsum("nt,ntm->nm", self.weights[members], found.double().expand(len(members), -1, -1))
        rows = []
        for k, (loss, predicted) in zip(members, means.tolist(), strict=True):
            client = self.federation.clients[k]
            row = {"client": client.name, "category": self.test.names[int(client.behaviour.busy)], "method": method}
            rows.append(row | {"loss": loss, "predicted": predicted})
        return rows

    def others(self, methods: Mapping[str, Any], train: Callable[[Sequence[Client]], dict[str, list[Any]]]) -> Rows:
        """The same for the contaminated clients: the base, what they send, and what they would have, not shuffled."""
        members = torch.where(~self.federation.benign)[0].tolist()
        if not members:
            return []
        clients = [self.federation.clients[k] for k in members]
        proper = train([replace(own, behaviour=replace(own.behaviour, shuffled=False)) for own in clients])
        held = {PROPER: {name: dict(zip(members, own, strict=True)) for name, own in proper.items()}}
        cases = {name: methods[name] for name in ("base", "local")} | held
        return [row for name, updates in cases.items() for row in self.rows(name, updates, benign=False)]

    def told(self, dense: Mapping[str, Tensor]) -> tuple[Rows, int]:
        """The same for refinement told the benign clients and a rank, that of ``TOLD_RANKS`` with the least mean loss.

        No rank is the true one here. It is chosen on the very pairs that it is judged with, which flatters it: an
        oracle, no method.
        """
        tried = {
            rank: self.rows(TOLD_RANK, oracle_updates(dense, self.federation.benign, rank))
            for rank in TOLD_RANKS
            if rank <= min(len(own[0]) for own in dense.values())
        }
        best = min(tried, key=lambda rank: sum(row["loss"] for row in tried[rank]))
        return tried[best], best


def response_study(
    settings: Iterable[str],
    seeds: int,
    sizes: ResponseSizes,
    *,
    seed: int = 0,
    cache: Path,
    device: str = "cpu",
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """`response_cell` for settings, over seeds: its tables, with a column ``kind`` as those of the label tasks."""
    settings = list(settings)
    for name in settings:
        material(RESPONSE_SETTINGS[name], sizes.base_steps, cache)  # made once, before worker processes look for it
    cells = [{"setting": name, "seed": s, **asdict(sizes)} for name in settings for s in range(seed, seed + seeds)]
    tables = sweep(response_cell, cells, shared={"cache": str(cache), "device": device}, cache=cache, jobs=jobs)
    return {name: table.assign(kind=KIND) for name, table in tables.items()}
