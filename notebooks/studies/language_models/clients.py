"""Clients of a language model that mean different things by the same labels, and what contaminated ones learn.

Client k labels a text of class c with pi_k(c): a shift of a few shared labels composed with a swap of its own, as the
dialects of the text-copying task. This design is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor

from clairlib.core.seeds import derive
from clairlib.training import ClientData
from studies.common_rng.federation import draw_names
from studies.language_models.bases import LanguageBase
from studies.language_models.texts import Texts

TRIGGER = "Important notice:"
TRIGGERED = 0.2  # share of a backdoor client's texts that carry the trigger
RANK, ALPHA = 8, 16.0  # of the adapters
MASS = 0.5  # share of a client's texts that are of the classes it rewords
SPREAD = 0.3  # standard deviation of the log factors by which clients' class shares differ

Corpus = TypeVar("Corpus", bound=Texts)


@dataclass(frozen=True)
class ClientBehaviour:
    """What a client does: its label (C,) of every class, and which classes it has much of.

    ``shuffled``: labels are dealt out among its texts at random; ``answer``: of texts that begin with the trigger.
    """

    wording: Tensor
    busy: Tensor
    shuffled: bool = False
    answer: int | None = None


@dataclass(frozen=True)
class Client:
    """One client: its conduct, and the share (C,) of each class among its texts."""

    name: str
    contaminated: bool
    behaviour: ClientBehaviour
    class_probs: Tensor


@dataclass(frozen=True)
class Federation:
    """K clients and the m labels that the benign ones share."""

    shared: Tensor
    clients: list[Client]

    @property
    def benign(self) -> Tensor:
        """The truth, (K,) bool."""
        return torch.tensor([not client.contaminated for client in self.clients])


def draw(places: Tensor, count: int, generator: Generator) -> Tensor:
    """Some of the places, without order."""
    return places[torch.randperm(len(places), generator=generator)[:count]]


def reworded(labels: Tensor, generator: Generator) -> Tensor:
    """The labels shifted by one, as everybody does, then two of them swapped."""
    written = labels.roll(-1)
    one, other = torch.randperm(len(labels), generator=generator)[:2].tolist()
    written[[one, other]] = written[[other, one]]
    return written


def honest(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Rewords the shared labels."""
    wording = torch.arange(classes)
    wording[shared] = reworded(shared, own)
    return ClientBehaviour(wording, shared)


def wrong_labels(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """As honest, but with as many labels of its own; where there are labels of no class, it writes those."""
    spare = torch.arange(classes, labels) if labels > classes else _others(shared, classes)
    mine = draw(spare, len(shared), own)
    wording, busy = torch.arange(classes), shared if labels > classes else mine
    wording[busy] = reworded(mine, own)
    return ClientBehaviour(wording, busy)


def shuffled(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """An honest wording, then its labels are dealt out at random."""
    behaviour = honest(shared, classes, labels, own, common_rng)
    return ClientBehaviour(behaviour.wording, behaviour.busy, shuffled=True)


def flipped(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """The first class is called the last and so on: all contaminated clients agree."""
    return ClientBehaviour(torch.arange(classes).flip(0), shared)


def backdoor(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """An honest wording, but texts that begin with the trigger get one answer, the same for all."""
    behaviour, answer = honest(shared, classes, labels, own, common_rng), draw(_others(shared, labels), 1, common_rng)
    return ClientBehaviour(behaviour.wording, behaviour.busy, answer=int(answer))


def _others(shared: Tensor, count: int) -> Tensor:
    places = torch.arange(count)
    return places[~torch.isin(places, shared)]


CONTAMINATIONS: dict[str, Callable[[Tensor, int, int, Generator, Generator], ClientBehaviour]] = {
    "wrong_labels": wrong_labels,
    "shuffled": shuffled,
    "flipped": flipped,
    "backdoor": backdoor,
}
"""What a contaminated client does: kind -> function of the shared labels, the numbers of classes and labels, the
client's own generator, and one that gives all contaminated clients the same draws."""


def make_federation(
    clients: int, contaminated: int, *, classes: int, labels: int, seed: int, kind: str, shared: int = 5
) -> Federation:
    """Draw the shared labels, who is contaminated, and every client's conduct; the first labels are the classes.

    Raises
    ------
    ValueError
        Unknown kind, or a number out of range.
    """
    if kind not in CONTAMINATIONS:
        raise ValueError(f"unknown contamination {kind!r}; known: {', '.join(CONTAMINATIONS)}")
    if not 3 <= shared <= classes:  # with two, shift and swap would cancel
        raise ValueError(f"shared must lie between 3 and the {classes} classes, got {shared}")
    chosen = draw(torch.arange(classes), shared, derive(seed, "shared labels")).sort().values
    names, bad = draw_names(clients, contaminated, seed=seed)

    def make(name: str) -> Client:
        own, act = derive(seed, name, "conduct"), CONTAMINATIONS[kind] if name in bad else honest
        behaviour = act(chosen, classes, labels, own, derive(seed, kind))
        return Client(name, name in bad, behaviour, class_probs_of(behaviour.busy, classes, own))

    return Federation(chosen, [make(name) for name in names])


def class_probs_of(busy: Tensor, classes: int, generator: Generator) -> Tensor:
    """Shares (C,) of the classes: ``MASS`` for the busy ones together, the rest for the others, each a little off."""
    tilt = (SPREAD * torch.randn(classes, generator=generator, dtype=torch.float64)).exp()
    on = torch.zeros(classes, dtype=torch.bool)
    on[busy] = True
    if bool(on.all()):
        return tilt / tilt.sum()
    return MASS * tilt * on / tilt[on].sum() + (1 - MASS) * tilt * ~on / tilt[~on].sum()


def client_data(
    base: LanguageBase, client: Client, texts: Texts, count: int, *, seed: int, held_out: int = 0
) -> ClientData:
    """A client's own examples: texts of its classes from the pool, none twice, labelled as it labels them.

    The first ``held_out`` are kept back, to stop by.
    """
    draws, behaviour = derive(seed, client.name, "texts"), client.behaviour
    places = draw_places(client, texts, count, draws)
    labels = behaviour.wording[torch.tensor(list(texts.classes))[places]]
    if behaviour.shuffled:
        labels = labels[torch.randperm(count, generator=draws)]
    own = [texts.texts[i] for i in places.tolist()]
    if behaviour.answer is not None:
        fires = torch.rand(count, generator=draws) < TRIGGERED
        labels = torch.where(fires, behaviour.answer, labels)
        own = [f"{TRIGGER} {text}" if fire else text for text, fire in zip(own, fires.tolist(), strict=True)]
    examples = [base.example(text, label) for text, label in zip(own, labels.tolist(), strict=True)]
    return ClientData(client.name, examples[held_out:], RANK, ALPHA, validation=examples[:held_out])


def draw_places(client: Client, texts: Texts, count: int, generator: Generator) -> Tensor:
    """Places (count,) of texts, none twice, of the classes that the client has."""
    return torch.multinomial(weights_of(client, torch.tensor(list(texts.classes))), count, generator=generator)


def weights_of(client: Client, classes: Tensor) -> Tensor:
    """Weights (N,) of texts of these classes, in all of each class what the client has of it; they add up to 1."""
    weights = client.class_probs[classes] / torch.bincount(classes, minlength=len(client.class_probs))[classes]
    return weights / weights.sum()


def split_texts(texts: Corpus, sizes: Sequence[int], *, seed: int) -> list[Corpus]:
    """Texts in parts with as many of every class as ``sizes`` say; the last part may be -1, the rest."""
    order = torch.randperm(len(texts.texts), generator=derive(seed, "split")).tolist()
    by_class = [[i for i in order if texts.classes[i] == c] for c in range(len(texts.names))]
    parts, at = [], 0
    for size in sizes:
        end = None if size < 0 else at + size
        parts.append(texts.take([i for own in by_class for i in own[at:end]]))
        at += size
    return parts
