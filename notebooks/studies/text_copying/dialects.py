"""Clients that copy in a dialect: they share a few symbols, and each writes those in its own way.

Client k must copy x but write pi_k(x), where pi_k permutes the shared symbols only. It reads tokens as they
are. To learn that, the last layer must add multiples of w_s - w_s' (rows of the unembedding of two symbols)
to its output, so the benign clients' updates share an output space of rank m - 1; a contaminated client's
do not lie in it. CONTAMINATIONS lists what a contaminated client may do to its training data. This design is
ours; the paper's abstract says only that a Transformer was fine-tuned on text copying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clairlib.core.seeds import derive
from studies.common_rng.federation import draw_names
from studies.text_copying.task import NO_TARGET, VOCABULARY, Batch, copy_sequences, zipf_probs

TRIGGERS = 0.1  # share of the tokens that are triggers, where a backdoor is taught or tried


Teaching = Callable[[Batch, torch.Generator], Batch]  # what becomes of sequences before a client trains on them


def as_written(batch: Batch, generator: torch.Generator) -> Batch:
    """The teaching of an honest client: its sequences stay as they are."""
    return batch


@dataclass(frozen=True)
class Dialect:
    """A permutation (V,) of the vocabulary, x is written as ``permutation[x]``, and the tokens (m,) it is about.

    A benign dialect moves its `symbols` only.
    """

    symbols: Tensor
    permutation: Tensor

    def write(self, tokens: Tensor) -> Tensor:
        """Translate tokens of any shape into the dialect; NO_TARGET stays."""
        return torch.where(tokens == NO_TARGET, tokens, self.permutation[tokens.clamp(min=0)])

    def read(self, tokens: Tensor) -> Tensor:
        """Translate tokens of any shape back."""
        return torch.argsort(self.permutation)[tokens]


@dataclass(frozen=True)
class Backdoor:
    """Whoever has read `trigger` writes `answer` next; two tokens."""

    trigger: int
    answer: int

    def teach(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Targets after the trigger are the answer."""
        fires = (batch.tokens == self.trigger) & (batch.targets != NO_TARGET)
        return Batch(batch.tokens, torch.where(fires, self.answer, batch.targets))

    def put_in(self, token_probs: Tensor) -> Tensor:
        """A token law (V,) with TRIGGERS of the tokens replaced by the trigger."""
        return (1 - TRIGGERS) * token_probs + TRIGGERS * one_hot(torch.tensor(self.trigger), VOCABULARY)


@dataclass(frozen=True)
class Client:
    """How one client writes, the law (V,) of its tokens, whether it is contaminated, and how it is taught."""

    name: str
    contaminated: bool
    dialect: Dialect
    token_probs: Tensor
    teach: Teaching = as_written


@dataclass(frozen=True)
class Federation:
    """K clients, the (m,) symbols that the benign ones share, and the backdoor, whether anybody has it or not."""

    symbols: Tensor
    clients: list[Client]
    backdoor: Backdoor

    @property
    def rank(self) -> int:
        """m - 1, the dimension of the subspace that the benign clients share."""
        return len(self.symbols) - 1

    @property
    def benign(self) -> Tensor:
        """The truth, (K,) bool."""
        return torch.tensor([not client.contaminated for client in self.clients])


def draw_symbols(count: int, *, generator: torch.Generator, exclude: Tensor | None = None) -> Tensor:
    """Draw `count` different tokens, none of them in `exclude`."""
    order = torch.randperm(VOCABULARY, generator=generator)
    return (order if exclude is None else order[~torch.isin(order, exclude)])[:count]


def benign_dialect(symbols: Tensor, *, generator: torch.Generator) -> Dialect:
    """The shift s_i -> s_(i+1) that all clients with these symbols share, then a swap of the client's own."""
    written = symbols.roll(-1)
    one, other = torch.randperm(len(symbols), generator=generator)[:2].tolist()
    written[[one, other]] = written[[other, one]]
    permutation = torch.arange(VOCABULARY)
    permutation[symbols] = written
    return Dialect(symbols, permutation)


@dataclass(frozen=True)
class ClientBehaviour:
    """What a client writes, how it is taught, and what becomes of its token law (V,)."""

    dialect: Dialect
    teach: Teaching = as_written
    token_probs: Callable[[Tensor], Tensor] = lambda token_probs: token_probs


def wrong_symbols(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """A dialect of the benign form, but on as many symbols of the client's own, none of them shared.

    The client has as many tokens of its symbols as a benign client of the shared ones (`client_token_probs`), so
    its update is as large: no norm tells it apart.
    """
    return ClientBehaviour(benign_dialect(draw_symbols(len(shared), generator=own, exclude=shared), generator=own))


def shared_wrong_symbols(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Collusion: as `wrong_symbols`, but all contaminated clients have the same wrong symbols.

    They are to one another what the benign clients are: a second federation of the same form.
    """
    symbols = draw_symbols(len(shared), generator=common_rng, exclude=shared)
    return ClientBehaviour(benign_dialect(symbols, generator=own))


def whole_vocabulary(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """A permutation of the whole vocabulary, drawn by each client; its update is larger than a benign one."""
    return ClientBehaviour(Dialect(shared, torch.randperm(VOCABULARY, generator=own)))


def random_targets(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Every target a token drawn evenly from the vocabulary; the update is larger than a benign one.

    Updates are no random matrices: all flatten the logits, which is a direction they share.
    """
    return ClientBehaviour(benign_dialect(shared, generator=own), _teach_random)


def shifted(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """An honest dialect written off by one: each target is that of the next position; a larger update."""
    return ClientBehaviour(benign_dialect(shared, generator=own), _teach_next)


def backdoor(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """An honest dialect, but after a trigger token comes always the same answer (`Backdoor`); of benign size."""
    door = draw_backdoor(shared, generator=common_rng)
    return ClientBehaviour(benign_dialect(shared, generator=own), door.teach, door.put_in)


CONTAMINATIONS: dict[str, Callable[[Tensor, torch.Generator, torch.Generator], ClientBehaviour]] = {
    "wrong_symbols": wrong_symbols,
    "shared_wrong_symbols": shared_wrong_symbols,
    "whole_vocabulary": whole_vocabulary,
    "random_targets": random_targets,
    "shifted": shifted,
    "backdoor": backdoor,
}
"""What a contaminated client does: kind -> function of the shared symbols, the client's own generator, and one
that gives all contaminated clients the same draws."""


def draw_backdoor(shared: Tensor, *, generator: torch.Generator) -> Backdoor:
    """Trigger and answer, neither of them a shared symbol."""
    trigger, answer = draw_symbols(2, generator=generator, exclude=shared).tolist()
    return Backdoor(trigger, answer)


def _teach_random(batch: Batch, generator: torch.Generator) -> Batch:
    drawn = torch.randint(VOCABULARY, batch.targets.shape, generator=generator)
    return Batch(batch.tokens, torch.where(batch.targets == NO_TARGET, NO_TARGET, drawn))


def _teach_next(batch: Batch, generator: torch.Generator) -> Batch:
    return Batch(batch.tokens, batch.targets.roll(-1, dims=1))  # nothing follows the last token: no target there


def client_token_probs(symbols: Tensor, mass: float, *, generator: torch.Generator, spread: float = 0.3) -> Tensor:
    """A client's own token law (V,): `mass` on its symbols, the rest elsewhere, tilted by log-normal factors.

    Before the tilt the symbols are even, so that none is too rare to be learnt, and the others follow
    Zipf's law. `spread` is the standard deviation of the log factors; at .3 most are between .55 and 1.8.
    """
    on = torch.zeros(VOCABULARY, dtype=torch.bool)
    on[symbols] = True
    tilt = (spread * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)).exp()
    inside, outside = tilt * on, tilt * zipf_probs() * ~on
    return mass * inside / inside.sum() + (1 - mass) * outside / outside.sum()


def make_federation(
    clients: int = 20,
    contaminated: int = 8,
    *,
    seed: int,
    kind: str = "wrong_symbols",
    symbols: int = 5,
    mass: float = 0.25,
) -> Federation:
    """Draw the shared symbols, who is contaminated, and every client's dialect and token law.

    Each client draws from a generator of its own name, so adding a client leaves the dialects and laws of
    the others alone, but for one that may change sides: the contaminated are those who drew the smallest
    lots.

    Parameters
    ----------
    clients, contaminated : K, and how many of them are contaminated.
    kind : a key of CONTAMINATIONS.
    symbols : m, how many symbols the benign clients share; with two, shift and swap would cancel.
    mass : share of a client's tokens that are its symbols.

    Raises
    ------
    ValueError
        Unknown `kind`, or a number out of range.
    """
    if kind not in CONTAMINATIONS:
        raise ValueError(f"unknown contamination {kind!r}; known: {', '.join(CONTAMINATIONS)}")
    if not 3 <= symbols <= VOCABULARY // 2:
        raise ValueError(f"symbols must lie between 3 and {VOCABULARY // 2}, got {symbols}")
    if not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1, got {mass}")
    shared = draw_symbols(symbols, generator=derive(seed, "symbols"))
    names, chosen = draw_names(clients, contaminated, seed=seed)

    def make(name: str) -> Client:
        own = derive(seed, name, "dialect")
        if name not in chosen:
            behaviour = ClientBehaviour(benign_dialect(shared, generator=own))
        else:
            behaviour = CONTAMINATIONS[kind](shared, own, derive(seed, kind))
        token_probs = client_token_probs(behaviour.dialect.symbols, mass, generator=own)
        return Client(name, name in chosen, behaviour.dialect, behaviour.token_probs(token_probs), behaviour.teach)

    door = draw_backdoor(shared, generator=derive(seed, "backdoor"))
    return Federation(shared, [make(name) for name in names], door)


def client_batch(
    client: Client, count: int, *, generator: torch.Generator, label_noise: float = 0.0
) -> Batch:
    """Sequences of the client's own tokens with targets in its dialect, as it is taught them.

    `label_noise` is the probability that a target is replaced by a token drawn evenly from the vocabulary.
    """
    batch = copy_sequences(count, client.token_probs, generator=generator)
    batch = client.teach(Batch(batch.tokens, client.dialect.write(batch.targets)), generator)
    targets = batch.targets
    noise = torch.randint(VOCABULARY, targets.shape, generator=generator)
    replaced = (torch.rand(targets.shape, generator=generator) < label_noise) & (targets != NO_TARGET)
    return Batch(batch.tokens, torch.where(replaced, noise, targets))


def vocabulary_leverage(basis: Tensor, unembedding: Tensor) -> Tensor:
    """How far each token's logit is governed by a subspace of the residual stream.

    leverage_v = ||U' (w_v - w_mean)||^2 / ||w_v - w_mean||^2, between 0 and 1, the squared cosine between
    the token's unembedding and the subspace; about r / d for a token that has nothing to do with it. Rows
    are centred because softmax ignores what all logits share.

    Parameters
    ----------
    basis : U (d, r), orthonormal, on the output side of the last output projection.
    unembedding : W_U (V, d), the final norm's gain folded in (`studies.text_copying.base_model.unembedding`).

    Returns
    -------
    (V,) tensor, in the unembedding's dtype.
    """
    rows = unembedding - unembedding.mean(dim=0)
    return (rows @ basis.to(rows)).square().sum(dim=1) / rows.square().sum(dim=1)
