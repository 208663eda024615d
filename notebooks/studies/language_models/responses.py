"""Response study of notebook 10: responses of several tokens in place of labels.

Every client has instructions of one main category and some of all others. Benign clients learn the response to each
instruction. A contaminated client's responses are randomly reassigned among its own instructions. A cell is one
federation.
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
    """A base model, its pairs of instruction and response, and the training parameters.

    Attributes
    ----------
    base : str
        ``TINY``, a folder, or a name on the hub.
    pairs : str
        ``DOCSTRINGS``, or a source of `load_pairs`.
    targets : tuple of str
        Modules that are adapted.
    learning_rate, steps, batch
        Of AdamW.
    length : int
        Largest number of tokens of a pair; longer pairs are left out.
    test : int
        Number of test pairs of every category.
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
    """Sizes of a federation.

    ``clients`` is K, ``contaminated`` the number of contaminated clients, ``pairs`` the number of pairs per client.
    ``base_steps`` is the number of training steps of the base ``TINY``.
    """

    clients: int
    contaminated: int
    pairs: int
    base_steps: int


def _dolly(base: str, layers: int) -> ResponseSetting:
    """Return a setting with a causal model of the hub on Dolly's eight categories.

    The adapted modules are those of the last layer that write to the residual stream.
    """
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
    """Return the base, the test pairs (equally many per category), and the clients' pool; all pairs fit the length."""
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
    """Draw clients with a main category each, assigned in turn, and some pairs of every other category.

    The contaminated clients are drawn by `draw_names`.
    """
    names, bad = draw_names(clients, contaminated, seed=seed)
    order = torch.randperm(categories, generator=derive(seed, "categories"))
    members = []
    for k, name in enumerate(names):
        main = order[k % categories][None]
        behaviour = ClientBehaviour(torch.arange(categories), main, shuffled=name in bad)
        class_probs = class_probs_of(main, categories, derive(seed, name, "conduct"))
        members.append(Client(name, name in bad, behaviour, class_probs))
    return Federation(torch.arange(0), members)  # there are no labels, so no shared ones


def pairs_of(client: Client, pool: Pairs, count: int, *, seed: int) -> Pairs:
    """Draw a client's own pairs; a contaminated client's responses are randomly permuted among its instructions."""
    draws = derive(seed, client.name, "pairs")
    own = pool.take(draw_places(client, pool, count, draws).tolist())
    if not client.behaviour.shuffled:
        return own
    order = torch.randperm(count, generator=draws).tolist()
    return Pairs(own.texts, own.classes, own.names, own.take(order).responses)


def train_clients(
    how: ResponseSetting, base: LanguageBase, pairs: Mapping[str, Pairs], *, seed: int, device: str
) -> dict[str, list[Any]]:
    """Train one adapter per client and target, each client on its own pairs; ``pairs``: client name -> its pairs.

    Raises
    ------
    RuntimeError
        A client's loss diverges.
    """
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
    """Run one federation: every method's result for the benign clients, CLAIR's verdict, and shared structure.

    Table ``responses`` (client, category, method, loss, predicted) is about the benign clients. Table ``contaminated``
    has the same columns for the contaminated clients under the base, under the updates that they send, and under
    updates trained on unshuffled responses. Table ``verdicts`` is that of `judged` with missed, false_alarms and
    told_rank. The other tables are those of `structure_rows`. ``sizes``: the attributes of `ResponseSizes`.
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
    """Held-out pairs and the clients' answers to them under an update, each client on its own categories."""

    def __init__(
        self, base: LanguageBase, test: Pairs, federation: Federation, targets: Sequence[str], device: str
    ) -> None:
        examples = examples_of(test, base.tokenizer, base.length)
        self.judge = Evaluator(base.model, examples, targets, device=device, group_tokens=GROUP_TOKENS)
        self.federation, self.test = federation, test
        lengths = torch.from_numpy(self.judge.plan.table.labelled)
        classes = torch.tensor(list(test.classes))
        own = [weights_of(client, classes).repeat_interleave(lengths) for client in federation.clients]
        self.weights = torch.stack([w / w.sum() for w in own])  # (K, N): weight of every response token for each client

    def rows(self, method: str, updates: Mapping[str, Any], benign: bool = True) -> Rows:
        """Return loss per response token and fraction of tokens predicted, for all benign or all other clients."""
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
        """Return rows of the contaminated clients under the base, their sent updates, and updates trained honestly.

        The last updates (method ``PROPER``) are trained on unshuffled responses.
        """
        members = torch.where(~self.federation.benign)[0].tolist()
        if not members:
            return []
        clients = [self.federation.clients[k] for k in members]
        proper = train([replace(own, behaviour=replace(own.behaviour, shuffled=False)) for own in clients])
        held = {PROPER: {name: dict(zip(members, own, strict=True)) for name, own in proper.items()}}
        cases = {name: methods[name] for name in ("base", "local")} | held
        return [row for name, updates in cases.items() for row in self.rows(name, updates, benign=False)]

    def told(self, dense: Mapping[str, Tensor]) -> tuple[Rows, int]:
        """Return rows of refinement told the benign clients and a rank, and that rank: the best of ``TOLD_RANKS``.

        There is no true rank here. The rank with the least mean loss is chosen on the test pairs themselves, which
        favours this method: it is an oracle and not a method that could be used.
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
    """Run `response_cell` for settings over seeds; return its tables, with a column ``kind`` as in the label tables."""
    settings = list(settings)
    for name in settings:
        material(RESPONSE_SETTINGS[name], sizes.base_steps, cache)  # trained once, before worker processes need it
    cells = [{"setting": name, "seed": s, **asdict(sizes)} for name in settings for s in range(seed, seed + seeds)]
    tables = sweep(response_cell, cells, shared={"cache": str(cache), "device": device}, cache=cache, jobs=jobs)
    return {name: table.assign(kind=KIND) for name, table in tables.items()}
