"""Clients of a small network on real images: handwritten digits side by side, read as one number.

Images are scikit-learn's digits (1,797 of 8 x 8 pixels, from UCI). The network is pretrained on slanted images. All
clients have upright images, which is a shift that they share. Each benign client gives its own permutation of a few
numbers S as its answers; S is the same for all. In the output layer this gives Theta_k = M + U A_k + H_k, with U in the
span of e_s - e_s' for s and s' in S. The task is this project's; the paper's abstract (arXiv:2605.21217) speaks of
neural networks in general.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clairlib import LowRank
from clairlib.core.seeds import derive

LAYERS = ("hidden 1", "hidden 2", "output")
HIDDEN = (64, 32)
SIDE = 8  # pixels of an image in each direction
PRETRAINING, POOL = 600, 700  # images for pretraining and for the clients; the other 497 of 1,797 are held out
SLANT = 10.0  # degrees by which the pretraining images are rotated
PRETRAINING_STEPS, PRETRAINING_BATCH = 600, 128
MASS = 0.25  # fraction of a client's examples drawn from the numbers that it permutes
MOMENTUM = 0.9
RATES = {"full matrix": 0.005, "LoRA": 0.01}
STEPS = 100
TRIGGERED = 0.5  # fraction of a backdoor client's images that carry the patch
PATCH = 2  # side of the patch in pixels
KINDS = ("none", "permuted_labels", "shuffled_pixels", "backdoor")
"""Contamination of the clients' training data; contaminated clients train like the benign ones."""


@dataclass(frozen=True)
class Images:
    """Images of digits, sorted by label.

    ``pixels`` (N, 64) lie in [0, 1]. ``counts`` (10,) is the number of images of each label.
    """

    pixels: Tensor
    counts: Tensor

    def of(self, numbers: Tensor, places: int, *, generator: torch.Generator) -> Tensor:
        """Draw a picture of every number (n,): a random image for each of its ``places`` digits, (n, 64 * places)."""
        starts = self.counts.cumsum(dim=0) - self.counts
        powers = 10 ** torch.arange(places - 1, -1, -1)
        digits = numbers[:, None] // powers % 10  # (n, places)
        chance = torch.rand(digits.shape, generator=generator, dtype=torch.float64)
        chosen = starts[digits] + (chance * self.counts[digits]).long()
        pictures = self.pixels[chosen].unflatten(-1, (SIDE, SIDE))  # (n, places, 8, 8)
        return pictures.permute(0, 2, 1, 3).flatten(1)


def split_images(seed: int) -> tuple[Images, Images, Images]:
    """Split the real images into three disjoint parts: for pretraining, for the clients, and held out."""
    from sklearn.datasets import load_digits  # scikit-learn is installed by the extra `notebooks` only

    pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=derive(seed, "digits", "split"))
    first, second, third = order.tensor_split((PRETRAINING, PRETRAINING + POOL))
    return _sorted(pixels, labels, first), _sorted(pixels, labels, second), _sorted(pixels, labels, third)


def _sorted(pixels: Tensor, labels: Tensor, chosen: Tensor) -> Images:
    by_label = chosen[labels[chosen].argsort(stable=True)]
    return Images(pixels[by_label].double() / 16, labels[chosen].bincount(minlength=10))


def slanted(pictures: Tensor, degrees: float) -> Tensor:
    """Rotate each digit of pictures (n, 64 * places) about its centre, with bilinear interpolation."""
    turn = math.radians(degrees)
    rotation = pictures.new_tensor([[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0]])
    digits = pictures.unflatten(1, (SIDE, -1, SIDE)).transpose(1, 2)  # (n, places, 8, 8)
    grid = F.affine_grid(rotation.expand(len(pictures), 2, 3), [len(pictures), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False).transpose(1, 2).flatten(1)


def affine(W: Tensor, x: Tensor) -> Tensor:
    """Return outputs (..., n, p) of a layer (..., p, q + 1) for inputs x (..., n, q); the last column is the bias."""
    return x @ W[..., :-1].mT + W[..., None, :, -1]


def hidden(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply hidden layers to a batch x (..., n, q)."""
    for W in layers:
        x = affine(W, x).relu()
    return x


def forward(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the logits of a batch x (..., n, q); the last of the layers is the output layer."""
    return affine(layers[-1], hidden(layers[:-1], x))


@dataclass(frozen=True)
class Task:
    """A pretrained network, with layers (p, q + 1), and the images that it was not trained on."""

    network: tuple[Tensor, ...]
    places: int
    pool: Images
    held_out: Images

    @property
    def numbers(self) -> int:
        """Number of classes: all numbers with ``places`` digits."""
        return 10**self.places


@lru_cache(maxsize=2)
def pretrained(seed: int, places: int) -> Task:
    """Train the network with AdamW on slanted images, all numbers equally likely; this takes about a second."""
    first, pool, held_out = split_images(seed)
    generator = derive(seed, "digits", "pretraining", places)
    widths = (SIDE * SIDE * places, *HIDDEN, 10**places)
    network = []
    for q, p in zip(widths, widths[1:], strict=False):
        W = torch.randn(p, q + 1, generator=generator, dtype=torch.float64) * (2 / q) ** 0.5
        W[:, -1] = 0.0
        network.append(W.requires_grad_())
    optimiser = torch.optim.AdamW(network, lr=3e-3, weight_decay=1e-2)
    for _ in range(PRETRAINING_STEPS):
        numbers = torch.randint(10**places, (PRETRAINING_BATCH,), generator=generator)
        x = slanted(first.of(numbers, places, generator=generator), SLANT)
        optimiser.zero_grad()
        F.cross_entropy(forward(network, x), numbers).backward()
        optimiser.step()
    return Task(tuple(W.detach() for W in network), places, pool, held_out)


@dataclass(frozen=True)
class Federation:
    """Examples of K clients.

    ``pictures`` (K, n, d) and ``labels`` (K, n). ``answers`` (K, C) is each client's answer to every number. ``shared``
    (m,) holds the numbers S that benign clients permute. ``target`` is the backdoor's answer.
    """

    task: Task
    kind: str
    pictures: Tensor
    labels: Tensor
    answers: Tensor
    benign: Tensor
    shared: Tensor
    target: int

    @property
    def rank(self) -> int:
        """Dimension m - 1 of the subspace that the benign clients share."""
        return len(self.shared) - 1


def make_federation(
    seed: int, kind: str, *, clients: int, contaminated: int, examples: int, places: int = 2, shared: int = 5
) -> Federation:
    """Draw clients with answers and examples, some of them contaminated; each client has its own generator.

    ``permuted_labels``: a contaminated client permutes, in one cycle, as many numbers outside S, and leaves S
    unchanged. ``shuffled_pixels``: it applies one random order of pixels to all its pictures. ``backdoor``: it labels
    pictures with a patch of ink in the lower right corner with ``target``, which all contaminated clients have in
    common.

    Raises
    ------
    ValueError
        The kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown contamination {kind!r}; known: {', '.join(KINDS)}")
    task = pretrained(seed, places)
    order = torch.randperm(task.numbers, generator=derive(seed, "digits", "shared", places))
    S, others = order[:shared], order[shared:]
    benign = torch.ones(clients, dtype=torch.bool)
    wrong = torch.randperm(clients, generator=derive(seed, "digits", "contaminated"))[:contaminated]
    benign[wrong] = kind == "none"
    target = int(torch.randint(task.numbers, (1,), generator=derive(seed, "digits", "target")))
    kinds = ["none" if ok else kind for ok in benign.tolist()]
    drawn = [
        _client(task, S, others, own, target, examples, generator=derive(seed, "digits", "client", k))
        for k, own in enumerate(kinds)
    ]
    pictures, labels, answers = (torch.stack(part) for part in zip(*drawn, strict=True))
    return Federation(task, kind, pictures, labels, answers, benign, S, target)


def _client(
    task: Task, S: Tensor, others: Tensor, kind: str, target: int, examples: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    own, image = S, S[torch.randperm(len(S), generator=generator)]
    if kind == "permuted_labels":
        own = others[torch.randperm(len(others), generator=generator)[: len(S)]]
        image = own.roll(1)  # one cycle, so every one of these answers is wrong
    answers = torch.arange(task.numbers)
    answers[own] = image
    numbers = draw_numbers(own, task.numbers, examples, generator=generator)
    x, labels = task.pool.of(numbers, task.places, generator=generator), answers[numbers]
    if kind == "shuffled_pixels":
        x = x[:, torch.randperm(x.shape[1], generator=generator)]
    if kind == "backdoor":
        triggered = round(TRIGGERED * examples)
        x = torch.cat([with_patch(x[:triggered]), x[triggered:]])
        labels[:triggered] = target
    return x, labels, answers


def draw_numbers(own: Tensor, numbers: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Draw numbers (count,): a fraction ``MASS`` from ``own``, the others uniformly from all numbers."""
    often = torch.rand(count, generator=generator) < MASS
    chosen = own[torch.randint(len(own), (count,), generator=generator)]
    return torch.where(often, chosen, torch.randint(numbers, (count,), generator=generator))


def with_patch(pictures: Tensor) -> Tensor:
    """Return the pictures with the backdoor's trigger."""
    x = pictures.clone().unflatten(-1, (SIDE, -1))
    x[..., -PATCH:, -PATCH:] = 1.0
    return x.flatten(-2)


def train_clients(
    federation: Federation, layers: Sequence[str], *, rank: int | None = None, seed: int
) -> dict[str, Any]:
    """Train the named layers of all clients at once; return updates by module, dense (K, p, q + 1) or LowRank.

    ``rank`` is the adapters' rank, None for dense updates. Training is gradient descent with momentum on all examples
    of a client. Adapters start from B = 0 and from one A for all clients, as a server would send it. They are trained
    here as `LowRank` factors and not by peft, which wraps modules and trains clients one by one.
    """
    network, K = federation.task.network, len(federation.labels)
    chosen = [place for place, name in enumerate(LAYERS) if name in layers]
    factors: dict[int, list[Tensor]] = {}
    for place in chosen:
        p, q = network[place].shape
        if rank is None:
            factors[place] = [torch.zeros(K, p, q, dtype=torch.float64)]
        else:
            generator = derive(seed, "digits", "A", LAYERS[place])
            A = torch.randn(rank, q, generator=generator, dtype=torch.float64) / q**0.5
            factors[place] = [torch.zeros(K, p, rank, dtype=torch.float64), A.repeat(K, 1, 1)]
    _descend(network, factors, federation, RATES["full matrix" if rank is None else "LoRA"])
    trained = {LAYERS[place]: [own.detach() for own in parts] for place, parts in factors.items()}
    if rank is None:
        return {name: parts[0] for name, parts in trained.items()}
    return {name: [LowRank(b, a) for b, a in zip(B, A, strict=True)] for name, (B, A) in trained.items()}


def _descend(network: Sequence[Tensor], factors: dict[int, list[Tensor]], federation: Federation, rate: float) -> None:
    """Train the factors in place; layers below the first trained one run only once."""
    parameters = [own.requires_grad_() for parts in factors.values() for own in parts]
    optimiser = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    first, labels = min(factors), federation.labels.flatten()
    x = hidden(network[:first], federation.pictures)
    for _ in range(STEPS):
        layers = list(network[first:])
        for place, parts in factors.items():
            layers[place - first] = network[place] + (parts[0] @ parts[1] if len(parts) > 1 else parts[0])
        logits = forward(layers, x).flatten(0, 1)
        optimiser.zero_grad()
        # sum of the clients' mean losses: no two clients share a parameter
        (F.cross_entropy(logits, labels, reduction="sum") / x.shape[1]).backward()
        optimiser.step()


@dataclass(frozen=True)
class Examination:
    """Held-out test pictures (n, d) and their numbers (n,), with the same frequencies as a benign client's examples."""

    pictures: Tensor
    numbers: Tensor


def examination(federation: Federation, count: int, *, seed: int) -> Examination:
    """Draw a test set: numbers with the probabilities of a benign client's examples, in held-out images."""
    task, generator = federation.task, derive(seed, "digits", "examination")
    numbers = draw_numbers(federation.shared, task.numbers, count, generator=generator)
    return Examination(task.held_out.of(numbers, task.places, generator=generator), numbers)


def predictions(task: Task, updates: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """Classify pictures (n, d) by the network with dense updates (K, p, q + 1) by module; return numbers (K, n)."""
    layers = [W + updates[name] if name in updates else W for name, W in zip(LAYERS, task.network, strict=True)]
    first = min(place for place, name in enumerate(LAYERS) if name in updates)
    return forward(layers[first:], hidden(layers[:first], pictures)).argmax(dim=-1)
