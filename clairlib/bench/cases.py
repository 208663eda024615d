"""Cases of `clair bench training`: base models, adapted modules, clients' data, and numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clairlib.core.seeds import derive
from clairlib.training import ClientData
from clairlib.training.schedule import NO_LABEL

LENGTH, RANK, ALPHA = 64, 8, 16  # LENGTH: most tokens of a sequence
SMALL, LARGE = "copying", "llama"
SIZES: dict[str, dict[str, Any]] = {  # SMALL has the size of the text-copying task's base (notebook 08)
    SMALL: {"hidden_size": 64, "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1}
    | {"vocab_size": 64, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None},
    LARGE: {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"vocab_size": 1024},
}
LABELLED = 1 / 6  # fraction of tokens with a label in EXPERIMENT, about that of text copying
EXPERIMENT, SEQUENCES = "experiment", 32
TARGETS = ("last", "output", "linear")
CLIENTS, TOKENS = (1, 4, 16, 64), (32, 128, 2048)
MOST_STEPS, LEAST_STEPS = 60, 5
QUICK, FULL = 2**16, 2**18  # most tokens over all clients and steps, which limits the steps
LARGER = 2  # LARGE has this many times fewer tokens

EXPLANATION = "; ".join(
    f"{name}: hidden {size['hidden_size']}, {size['num_hidden_layers']} layers, vocabulary {size['vocab_size']}"
    for name, size in SIZES.items()
) + (
    f"; both untrained, in float32, adapters of rank {RANK}; tokens are random, as their values change neither time "
    f"nor memory. {EXPERIMENT}: the last output projection, {SEQUENCES} sequences per client, a sixth of the tokens "
    "labelled; in all other cases every token is labelled. last: o_proj and down_proj of the last layer; output: those "
    "of every layer; linear: every linear module of every layer."
)


@dataclass(frozen=True)
class Case:
    """One row of the table: K clients, each of which trains on all its ``tokens`` at every step; see EXPLANATION."""

    base: str
    targets: str
    clients: int
    tokens: int
    steps: int


def cases(
    clients: Sequence[int] | None = None, tokens: Sequence[int] | None = None, *, full: bool = False
) -> list[Case]:
    """Return the rows, without ``full`` only a part: the copying experiment, then CLIENTS by TOKENS by TARGETS by base.

    Clients take MOST_STEPS steps. If all of them together have many tokens, they take fewer, but at least LEAST_STEPS.

    Raises
    ------
    ValueError
        A number of tokens is neither 2 .. LENGTH nor a multiple of LENGTH.
    """
    for n in tokens or ():
        if n < 2 or (n > LENGTH and n % LENGTH):
            raise ValueError(f"tokens of a client must be 2 .. {LENGTH} or a multiple of {LENGTH}, got {n}")
    clients = clients or (CLIENTS if full else (1, 16))
    chosen = [Case(SMALL, EXPERIMENT, K, SEQUENCES * LENGTH, MOST_STEPS) for K in clients]
    for base in (SMALL, LARGE):
        quick = TOKENS[1:] if base == SMALL else TOKENS[1:2]
        for targets in TARGETS if full else TARGETS[:2]:
            for n in tokens or (TOKENS if full else quick):
                for K in clients:
                    steps = (FULL if full else QUICK) // (K * n) // (1 if base == SMALL else LARGER)
                    chosen.append(Case(base, targets, K, n, min(max(steps, LEAST_STEPS), MOST_STEPS)))
    return chosen


def model_of(case: Case, *, seed: int) -> tuple[Any, list[str]]:
    """Return the untrained base model and the full names of the adapted modules."""
    sizes = SIZES[case.base] | {"max_position_embeddings": LENGTH}
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(derive(seed, "bench", "weights").initial_seed())
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, use_cache=False))
    last = f"layers.{model.config.num_hidden_layers - 1}"
    ends = {
        EXPERIMENT: (f"{last}.self_attn.o_proj",), "last": (f"{last}.self_attn.o_proj", f"{last}.mlp.down_proj"),
        "output": ("o_proj", "down_proj"), "linear": ("_proj",),
    }[case.targets]  # fmt: skip
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return model.eval(), [name for name in linear if name.endswith(ends)]


def data_of(case: Case, vocabulary: int, *, seed: int) -> list[ClientData]:
    """Draw the clients' examples."""
    clients, length = [], min(LENGTH, case.tokens)
    for k in range(case.clients):
        draws = derive(seed, "bench", f"client_{k}")
        tokens = labels = torch.randint(vocabulary, (case.tokens // length, length), generator=draws)
        if case.targets == EXPERIMENT:
            labels = torch.where(torch.rand(tokens.shape, generator=draws) < LABELLED, tokens, NO_LABEL)
        examples = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
        clients.append(ClientData(f"client_{k}", examples, rank=RANK, alpha=ALPHA))
    return clients
