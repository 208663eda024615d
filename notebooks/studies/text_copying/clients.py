"""Clients on the text-copying base model: training, PEFT adapter folders, and evaluation of many updates at once.

Updates are evaluated as dense matrices by module, without copies of the model. If only the last output projection is
updated, the layers below it run once per client (`run_prefix`), and each update runs only the rest (`run_suffix`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.func import functional_call

from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.training import ClientData, Schedule, TrainedClient, save_adapters, train_adapters
from studies.text_copying import task as copying
from studies.text_copying.base_model import Base, BaseConfig, base_model
from studies.text_copying.dialects import Backdoor, Client, Federation, client_batch, make_federation
from studies.text_copying.task import NO_TARGET, Accuracy, Batch

Updates = Mapping[str, Tensor]  # module name -> dense updates (M, p, q) of M clients or of M methods

TARGETS = {"last": ("self_attn.o_proj",), "output": ("self_attn.o_proj", "mlp.down_proj")}
"""Adapted modules: the last layer's attention output projection, or every matrix that writes to the residual stream."""


@dataclass(frozen=True)
class Recipe:
    """Training parameters of a client: full-batch AdamW on its own sequences.

    ``rank`` is that of the LoRA adapter, None for full-matrix updates. ``targets`` is a key of TARGETS. ``held_out``
    sequences are kept back for early stopping: the client ends with the weights that are best on them.
    """

    rank: int | None = 8
    alpha: int = 16
    sequences: int = 32
    label_noise: float = 0.1
    steps: int = 60
    learning_rate: float = 3e-3
    targets: str = "last"
    held_out: int = 0


@dataclass(frozen=True)
class TrainedFederation:
    """K clients and their trained updates, in the clients' order."""

    base: Base
    federation: Federation
    trained: list[TrainedClient]

    @property
    def names(self) -> list[str]:
        """The clients' names."""
        return [client.name for client in self.trained]

    @property
    def updates(self) -> dict[str, Any]:
        """Updates that the server receives: module name -> list of K LowRank, or (K, p, q) for full-matrix updates."""
        modules: dict[str, list[Any]] = {}
        for client in self.trained:
            for name, update in client.updates.items():
                modules.setdefault(name, []).append(update)
        full = isinstance(next(iter(modules.values()))[0], Tensor)
        return {name: torch.stack(own) for name, own in modules.items()} if full else modules

    @property
    def dense(self) -> dict[str, Tensor]:
        """The server's updates as dense matrices (K, p, q), float64, by module."""
        return as_dense(self.updates)


@dataclass(frozen=True)
class Prefix:
    """Activations of the frozen part at the N labelled positions.

    Attributes
    ----------
    attended : (N, hidden), input of the last output projection.
    residual : (N, hidden), residual stream to which the projection's output is added.
    """

    attended: Tensor
    residual: Tensor


def target_modules(base: Base, targets: str) -> list[str]:
    """Return the names of the modules behind a key of TARGETS, from the lowest layer up."""
    layers = range(base.model.config.num_hidden_layers)
    chosen = layers[-1:] if targets == "last" else layers
    return [f"model.layers.{layer}.{name}" for layer in chosen for name in TARGETS[targets]]


def train_federation(
    seed: int,
    recipe: Recipe | None = None,
    *,
    clients: int = 20,
    contaminated: int = 8,
    kind: str = "wrong_symbols",
    cache: Path | str,
) -> TrainedFederation:
    """Train the base model, the clients and their updates, all from one seed; ``kind`` is a key of CONTAMINATIONS.

    ``cache`` holds base models; the seed's base model is trained if it is not there.
    """
    base = base_model(BaseConfig(seed=seed), cache=cache)
    federation = make_federation(clients, contaminated, seed=seed, kind=kind)
    return TrainedFederation(base, federation, train(base, federation.clients, seed=seed, recipe=recipe))


def train(
    base: Base, clients: Iterable[Client], *, seed: int, recipe: Recipe | None = None
) -> list[TrainedClient]:
    """Train every client's update on its own sequences with label noise.

    Initial factors and data are drawn by the client's name. Clients have different initial A: one A for all would align
    the row spaces of all adapters, contaminated ones included.

    Raises
    ------
    RuntimeError
        A client's loss diverges.
    """
    recipe = recipe or Recipe()
    schedule = Schedule(steps=recipe.steps, learning_rate=recipe.learning_rate, check_every=5)
    data = [client_data(client, recipe, seed=seed) for client in clients]
    trained = train_adapters(base.model, data, target_modules(base, recipe.targets), schedule, seed=seed)
    for client in trained:
        if client.status == "diverged":
            raise RuntimeError(f"client {client.name!r} diverged at step {client.diverged_at}; lower the learning rate")
    return trained


def client_data(client: Client, recipe: Recipe, *, seed: int) -> ClientData:
    """Convert a client's sequences for the trainer: labels unshifted, held-out sequences for early stopping first."""
    draws = derive(seed, client.name, "training")
    batch = client_batch(client, recipe.sequences, generator=draws, label_noise=recipe.label_noise)
    labels = batch.targets.roll(1, dims=1)  # targets[t] follows tokens[t]; the last token has none
    examples = [{"input_ids": x, "labels": y} for x, y in zip(batch.tokens, labels, strict=True)]
    held, own = examples[: recipe.held_out], examples[recipe.held_out :]
    return ClientData(client.name, own, rank=recipe.rank, alpha=recipe.alpha, validation=held)


def train_clients(
    base: Base, clients: Iterable[Client], folder: Path | str, *, seed: int, recipe: Recipe | None = None
) -> list[Path]:
    """Train the clients and save each one's PEFT adapter folder, ``folder/<client name>``.

    Parameters
    ----------
    folder : parent of the adapter folders; adapters of the same names are replaced.
    seed : each client's data and initial factors are drawn from this seed and the client's name.

    Returns
    -------
    list of Path
        The adapter folders, in the clients' order.

    Raises
    ------
    FileExistsError
        `folder` holds something other than these clients' adapters, which could later be mistaken for a client.
    """
    clients, folder = list(clients), Path(folder)
    names = {client.name for client in clients}
    strangers = sorted({entry.name for entry in folder.iterdir()} - names) if folder.is_dir() else []
    if strangers:
        raise FileExistsError(f"{folder} holds {strangers[0]!r}, none of the clients; choose another")
    return save_adapters(base.model, train(base, clients, seed=seed, recipe=recipe), folder)


def load_updates(base: Base, folders: Sequence[Path]) -> dict[str, Tensor]:
    """Read K adapter folders with peft; return dense updates (K, p, q) by module, as peft multiplies them out."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folders[0]), adapter_name="0")
    for place, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(place))
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    places = [str(place) for place in range(len(folders))]
    return {name: torch.stack([m.get_delta_weight(k).detach() for k in places]) for name, m in layers.items()}


@torch.no_grad()
def updated_logits(base: Base, batch: Batch, updates: Updates) -> Tensor:
    """Return logits (M, N, V) at a batch's N labelled positions, under each of M updates of the base model."""
    labelled = batch.targets != NO_TARGET
    (last,) = target_modules(base, "last")
    if list(updates) == [last]:
        return run_suffix(base.model, run_prefix(base.model, batch), updates[last].to(base.model.dtype))
    count = len(next(iter(updates.values())))
    return torch.stack([_forward(base.model, batch.tokens, updates, m)[labelled] for m in range(count)])


def _forward(model: Any, tokens: Tensor, updates: Updates, m: int) -> Tensor:
    """Return logits (n, length, V) of the model under update m."""
    old = {name: model.get_submodule(name).weight for name in updates}
    new = {f"{name}.weight": old[name] + own[m].to(old[name]) for name, own in updates.items()}
    return functional_call(model, new, (tokens,)).logits


@torch.no_grad()
def run_prefix(model: Any, batch: Batch) -> Prefix:
    """Run the model once and keep what enters the last output projection, which its update cannot change."""
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[-1]
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.update(residual=inputs[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(attended=inputs[0])),
    ]
    try:
        model(batch.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    labelled = batch.targets != NO_TARGET
    return Prefix(seen["attended"][labelled], seen["residual"][labelled])


def run_suffix(model: Any, prefix: Prefix, update: Tensor) -> Tensor:
    """Return logits (M, N, V) under updates (M, hidden, hidden) of the last output projection.

    Projection, residual, MLP, norm and head treat each position separately.
    """
    layer = model.model.layers[-1]
    stream = prefix.residual + layer.self_attn.o_proj(prefix.attended) + prefix.attended @ update.mT
    stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    return model.lm_head(model.model.norm(stream))


def evaluate(base: Base, client: Client, updates: Updates, *, seed: int, count: int = 200) -> list[Accuracy]:
    """Measure a client's teacher-forced accuracy under M updates, on fresh sequences with clean labels in its dialect.

    Every update is evaluated on the same `count` sequences.
    """
    batch = client_batch(client, count, generator=derive(seed, client.name, "evaluation"))
    targets = batch.targets[batch.targets != NO_TARGET]
    logits = updated_logits(base, batch, updates)
    return [copying.copy_accuracy(own, targets, client.dialect.symbols) for own in logits]


@torch.no_grad()
def evaluate_free_running(
    base: Base, client: Client, updates: Updates, *, seed: int, count: int = 20
) -> list[float]:
    """Measure a client's accuracy under M updates when the model copies from its own output.

    The dialect translates each written token back before the model reads it (`Dialect.read`).
    """
    batch = client_batch(client, count, generator=derive(seed, client.name, "free running"))
    count = len(next(iter(updates.values())))
    models = [partial(_forward, base.model, updates=updates, m=m) for m in range(count)]
    return [copying.free_running_accuracy(model, batch, client.dialect.read) for model in models]


def backdoor_success(
    base: Base, client: Client, backdoor: Backdoor, updates: Updates, *, seed: int, count: int = 100
) -> list[float]:
    """Measure the attack success rate of M updates: the fraction of triggers after which the model writes the answer.

    The sequences are the client's, with a tenth of their tokens replaced by triggers. Only labelled positions count.
    """
    token_probs = backdoor.put_in(client.token_probs)
    batch = copying.copy_sequences(count, token_probs, generator=derive(seed, client.name, "backdoor"))
    fires = (batch.tokens == backdoor.trigger)[batch.targets != NO_TARGET]
    guesses = updated_logits(base, batch, updates).argmax(dim=-1)[:, fires]
    return (guesses == backdoor.answer).double().mean(dim=1).tolist()
