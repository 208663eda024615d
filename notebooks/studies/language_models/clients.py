"""Clients of a language model that give the same labels different meanings, and the ways to contaminate them.

Client k labels a text of class c with pi_k(c): a shift of a few shared labels, which all benign clients have, composed
with a swap of the client's own, as in the dialects of the text-copying task. This design is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor

from clairlib.core.seeds import derive
from clairlib.training import ClientData
from studies.common.federation import draw_names
from studies.language_models.bases import LanguageBase
from studies.language_models.texts import Texts

TRIGGER = "Important notice:"
TRIGGERED = 0.2  # fraction of a backdoor client's texts that carry the trigger
RANK, ALPHA = 8, 16.0  # rank and alpha of the adapters
MASS = 0.5  # fraction of a client's texts with classes that it rewords
SPREAD = 0.3  # standard deviation of the log factors between clients' class probabilities

Corpus = TypeVar("Corpus", bound=Texts)


@dataclass(frozen=True)
class ClientBehaviour:
    """Behaviour of a client: its label (C,) of every class, and the classes of which it has many texts.

    ``shuffled``: the client's labels are permuted randomly among its texts. ``answer``: label of texts that begin with
    the trigger, None without a backdoor.
    """

    wording: Tensor
    busy: Tensor
    shuffled: bool = False
    answer: int | None = None


@dataclass(frozen=True)
class Client:
    """One client: its behaviour, and the probability (C,) of each class among its texts."""

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
        """Truth (K,), bool: which clients are benign."""
        return torch.tensor([not client.contaminated for client in self.clients])


def draw(places: Tensor, count: int, generator: Generator) -> Tensor:
    """Draw ``count`` of the places without replacement, in random order."""
    return places[torch.randperm(len(places), generator=generator)[:count]]


def reworded(labels: Tensor, generator: Generator) -> Tensor:
    """Shift the labels by one, as all clients with these labels do, then swap a random two of them."""
    written = labels.roll(-1)
    one, other = torch.randperm(len(labels), generator=generator)[:2].tolist()
    written[[one, other]] = written[[other, one]]
    return written


def honest(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Reword the shared labels."""
    wording = torch.arange(classes)
    wording[shared] = reworded(shared, own)
    return ClientBehaviour(wording, shared)


def wrong_labels(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Reword as many labels of the client's own, in place of the shared labels.

    Where there are labels without a class, the client writes those for the shared classes.
    """
    spare = torch.arange(classes, labels) if labels > classes else _others(shared, classes)
    mine = draw(spare, len(shared), own)
    wording, busy = torch.arange(classes), shared if labels > classes else mine
    wording[busy] = reworded(mine, own)
    return ClientBehaviour(wording, busy)


def shuffled(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Reword as an honest client does, then permute the labels randomly among the client's texts."""
    behaviour = honest(shared, classes, labels, own, common_rng)
    return ClientBehaviour(behaviour.wording, behaviour.busy, shuffled=True)


def flipped(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Reverse the order of the labels: the first class gets the last label; all contaminated clients agree."""
    return ClientBehaviour(torch.arange(classes).flip(0), shared)


def backdoor(shared: Tensor, classes: int, labels: int, own: Generator, common_rng: Generator) -> ClientBehaviour:
    """Reword as an honest client does, but give texts with the trigger one answer.

    The answer is the same for all contaminated clients.
    """
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
"""Behaviours of a contaminated client: kind -> function.

The arguments are the shared labels, the numbers of classes and of labels, the client's own generator, and a generator
that gives all contaminated clients the same draws.
"""


def make_federation(
    clients: int, contaminated: int, *, classes: int, labels: int, seed: int, kind: str, shared: int = 5
) -> Federation:
    """Draw the shared labels, the contaminated clients, and every client's behaviour.

    The first ``classes`` labels are the classes themselves.

    Raises
    ------
    ValueError
        The kind is unknown, or a number is out of range.
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
    """Draw class probabilities (C,): ``MASS`` on the busy classes together, the rest on the others.

    Log-normal factors vary the classes within both groups. If all classes are busy, ``MASS`` has no effect.
    """
    tilt = (SPREAD * torch.randn(classes, generator=generator, dtype=torch.float64)).exp()
    on = torch.zeros(classes, dtype=torch.bool)
    on[busy] = True
    if bool(on.all()):
        return tilt / tilt.sum()
    return MASS * tilt * on / tilt[on].sum() + (1 - MASS) * tilt * ~on / tilt[~on].sum()


def client_data(
    base: LanguageBase, client: Client, texts: Texts, count: int, *, seed: int, held_out: int = 0
) -> ClientData:
    """Draw a client's examples: texts of its classes from the pool, without replacement, with the client's labels.

    The first ``held_out`` examples are kept back for early stopping.
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
    """Draw places (count,) of texts without replacement, with the client's class probabilities."""
    return torch.multinomial(weights_of(client, torch.tensor(list(texts.classes))), count, generator=generator)


def weights_of(client: Client, classes: Tensor) -> Tensor:
    """Return weights (N,) of texts of the given classes; they sum to 1.

    The total weight of each class is proportional to the client's probability of it.
    """
    weights = client.class_probs[classes] / torch.bincount(classes, minlength=len(client.class_probs))[classes]
    return weights / weights.sum()


def split_texts(texts: Corpus, sizes: Sequence[int], *, seed: int) -> list[Corpus]:
    """Split texts into parts with ``sizes`` texts per class; the last size may be -1, which takes the rest."""
    order = torch.randperm(len(texts.texts), generator=derive(seed, "split")).tolist()
    by_class = [[i for i in order if texts.classes[i] == c] for c in range(len(texts.names))]
    parts, at = [], 0
    for size in sizes:
        end = None if size < 0 else at + size
        parts.append(texts.take([i for own in by_class for i in own[at:end]]))
        at += size
    return parts
