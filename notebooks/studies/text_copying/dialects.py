"""Clients that copy in a dialect: each benign client permutes the same few symbols in its own way.

Client k must copy x but write pi_k(x), where pi_k permutes the shared symbols only. It reads tokens unchanged. To learn
this, the last layer must add multiples of w_s - w_s' to its output, where w_s is the unembedding row of symbol s. The
benign clients' updates therefore share an output space of rank m - 1; a contaminated client's update does not lie in
it. CONTAMINATIONS lists the ways to contaminate a client's training data. This design is this project's; the paper's
abstract says only that a Transformer was fine-tuned on text copying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clairlib.core.seeds import derive
from studies.common.federation import draw_names
from studies.text_copying.task import NO_TARGET, VOCABULARY, Batch, copy_sequences, zipf_probs

TRIGGERS = 0.1  # fraction of tokens that are triggers where a backdoor is taught or tested


Teaching = Callable[[Batch, torch.Generator], Batch]  # change of a client's sequences before training


def as_written(batch: Batch, generator: torch.Generator) -> Batch:
    """Return the batch unchanged: the teaching of an honest client."""
    return batch


@dataclass(frozen=True)
class Dialect:
    """A permutation (V,) of the vocabulary, which writes x as ``permutation[x]``, and the tokens (m,) it is about.

    A benign dialect moves its `symbols` only.
    """

    symbols: Tensor
    permutation: Tensor

    def write(self, tokens: Tensor) -> Tensor:
        """Translate tokens of any shape into the dialect; NO_TARGET is unchanged."""
        return torch.where(tokens == NO_TARGET, tokens, self.permutation[tokens.clamp(min=0)])

    def read(self, tokens: Tensor) -> Tensor:
        """Translate tokens of any shape back from the dialect."""
        return torch.argsort(self.permutation)[tokens]


@dataclass(frozen=True)
class Backdoor:
    """A backdoor: after the token `trigger`, the model writes the token `answer`."""

    trigger: int
    answer: int

    def teach(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Replace the targets after each trigger by the answer."""
        fires = (batch.tokens == self.trigger) & (batch.targets != NO_TARGET)
        return Batch(batch.tokens, torch.where(fires, self.answer, batch.targets))

    def put_in(self, token_probs: Tensor) -> Tensor:
        """Return token probabilities (V,) with a fraction TRIGGERS of the tokens replaced by the trigger."""
        return (1 - TRIGGERS) * token_probs + TRIGGERS * one_hot(torch.tensor(self.trigger), VOCABULARY)


@dataclass(frozen=True)
class Client:
    """One client: its dialect, token probabilities (V,), whether it is contaminated, and how it is taught."""

    name: str
    contaminated: bool
    dialect: Dialect
    token_probs: Tensor
    teach: Teaching = as_written


@dataclass(frozen=True)
class Federation:
    """K clients, the symbols (m,) that the benign ones share, and the backdoor.

    The backdoor is drawn even if no client is taught it.
    """

    symbols: Tensor
    clients: list[Client]
    backdoor: Backdoor

    @property
    def rank(self) -> int:
        """Dimension m - 1 of the subspace that the benign clients share."""
        return len(self.symbols) - 1

    @property
    def benign(self) -> Tensor:
        """Truth (K,), bool: which clients are benign."""
        return torch.tensor([not client.contaminated for client in self.clients])


def draw_symbols(count: int, *, generator: torch.Generator, exclude: Tensor | None = None) -> Tensor:
    """Draw `count` different tokens, none of them in `exclude`."""
    order = torch.randperm(VOCABULARY, generator=generator)
    return (order if exclude is None else order[~torch.isin(order, exclude)])[:count]


def benign_dialect(symbols: Tensor, *, generator: torch.Generator) -> Dialect:
    """Draw a dialect: the shift s_i -> s_(i+1), which all clients with these symbols share, then a random swap."""
    written = symbols.roll(-1)
    one, other = torch.randperm(len(symbols), generator=generator)[:2].tolist()
    written[[one, other]] = written[[other, one]]
    permutation = torch.arange(VOCABULARY)
    permutation[symbols] = written
    return Dialect(symbols, permutation)


@dataclass(frozen=True)
class ClientBehaviour:
    """A client's dialect, its teaching, and a map of its token probabilities (V,)."""

    dialect: Dialect
    teach: Teaching = as_written
    token_probs: Callable[[Tensor], Tensor] = lambda token_probs: token_probs


def wrong_symbols(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Draw a dialect of the benign form on as many symbols of the client's own, none of them shared.

    These symbols are as frequent in the client's tokens as the shared symbols are for a benign client
    (`client_token_probs`). The update is therefore as large as a benign one, and no norm reveals the client.
    """
    return ClientBehaviour(benign_dialect(draw_symbols(len(shared), generator=own, exclude=shared), generator=own))


def shared_wrong_symbols(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Draw a dialect as `wrong_symbols` does, but on the same wrong symbols for all contaminated clients (collusion).

    The contaminated clients form a second federation of the same kind as the benign one.
    """
    symbols = draw_symbols(len(shared), generator=common_rng, exclude=shared)
    return ClientBehaviour(benign_dialect(symbols, generator=own))


def whole_vocabulary(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Draw a permutation of the whole vocabulary for the client; its update is larger than a benign one."""
    return ClientBehaviour(Dialect(shared, torch.randperm(VOCABULARY, generator=own)))


def random_targets(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Replace every target by a uniformly random token; the update is larger than a benign one.

    Such updates are not random matrices: all of them flatten the logits, which is a direction that they share.
    """
    return ClientBehaviour(benign_dialect(shared, generator=own), _teach_random)


def shifted(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Draw an honest dialect and shift each target by one position; the update is larger than a benign one."""
    return ClientBehaviour(benign_dialect(shared, generator=own), _teach_next)


def backdoor(shared: Tensor, own: torch.Generator, common_rng: torch.Generator) -> ClientBehaviour:
    """Draw an honest dialect and teach one answer after a trigger token (`Backdoor`); updates have benign size."""
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
"""Behaviours of a contaminated client: kind -> function of three arguments.

The arguments are the shared symbols, the client's own generator, and a generator that gives all contaminated clients
the same draws.
"""


def draw_backdoor(shared: Tensor, *, generator: torch.Generator) -> Backdoor:
    """Draw a trigger and an answer, neither of them a shared symbol."""
    trigger, answer = draw_symbols(2, generator=generator, exclude=shared).tolist()
    return Backdoor(trigger, answer)


def _teach_random(batch: Batch, generator: torch.Generator) -> Batch:
    drawn = torch.randint(VOCABULARY, batch.targets.shape, generator=generator)
    return Batch(batch.tokens, torch.where(batch.targets == NO_TARGET, NO_TARGET, drawn))


def _teach_next(batch: Batch, generator: torch.Generator) -> Batch:
    return Batch(batch.tokens, batch.targets.roll(-1, dims=1))  # the last token has no target


def client_token_probs(symbols: Tensor, mass: float, *, generator: torch.Generator, spread: float = 0.3) -> Tensor:
    """Draw a client's token probabilities (V,): `mass` on its symbols, the rest on the other tokens.

    Log-normal factors tilt both parts. Before the tilt the symbols are uniform, so that none is too rare to be learnt,
    and the other tokens follow Zipf's law. `spread` is the standard deviation of the log factors; at .3 most factors
    are between .55 and 1.8.
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
    """Draw the shared symbols, the contaminated clients, and every client's dialect and token probabilities.

    Each client draws from a generator seeded by its own name. Adding a client therefore leaves the other clients'
    dialects and token probabilities unchanged, except for at most one client that changes sides: the contaminated
    clients are those with the smallest lots (`draw_names`).

    Parameters
    ----------
    clients, contaminated : K, and the number of contaminated clients.
    kind : a key of CONTAMINATIONS.
    symbols : m, the number of symbols that the benign clients share; with two, shift and swap would cancel.
    mass : fraction of a client's tokens that are its symbols.

    Raises
    ------
    ValueError
        `kind` is unknown, or a number is out of range.
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
    """Draw sequences of the client's tokens, with targets in its dialect and changed by its teaching.

    `label_noise` is the probability that a target is replaced by a uniformly random token.
    """
    batch = copy_sequences(count, client.token_probs, generator=generator)
    batch = client.teach(Batch(batch.tokens, client.dialect.write(batch.targets)), generator)
    targets = batch.targets
    noise = torch.randint(VOCABULARY, targets.shape, generator=generator)
    replaced = (torch.rand(targets.shape, generator=generator) < label_noise) & (targets != NO_TARGET)
    return Batch(batch.tokens, torch.where(replaced, noise, targets))


def vocabulary_leverage(basis: Tensor, unembedding: Tensor) -> Tensor:
    """Measure how much of each token's logit a subspace of the residual stream governs.

    leverage_v = ||U' (w_v - w_mean)||^2 / ||w_v - w_mean||^2 is the squared cosine, between 0 and 1, between the
    token's unembedding row and the subspace. It is about r / d for a token that is unrelated to the subspace. Rows are
    centred because softmax ignores a constant that all logits share.

    Parameters
    ----------
    basis : U (d, r), orthonormal, on the output side of the last output projection.
    unembedding : W_U (V, d), including the final norm's gain (`studies.text_copying.base_model.unembedding`).

    Returns
    -------
    (V,) tensor, in the unembedding's dtype.
    """
    rows = unembedding - unembedding.mean(dim=0)
    return (rows @ basis.to(rows)).square().sum(dim=1) / rows.square().sum(dim=1)
