"""Clients' PEFT LoRA adapters on the text-copying base model: train, save, load, evaluate.

Only the last attention output projection is adapted. Everything below it is frozen, so its activations are
computed once a client (`run_prefix`), and training runs only what follows (`run_suffix`): same loss, same
gradients, a fraction of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clairlib import copying
from clairlib.base import Base
from clairlib.copying import Accuracy, Batch
from clairlib.dialects import Client, client_batch
from clairlib.seeds import derive


@dataclass(frozen=True)
class Recipe:
    """How a client trains: LoRA rank and alpha, its own sequences, and full-batch AdamW steps on them."""

    rank: int = 8
    alpha: int = 16
    sequences: int = 32
    label_noise: float = 0.1
    steps: int = 60
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Prefix:
    """What the frozen part computes, at the N labelled positions.

    Attributes
    ----------
    attended : (N, hidden), input of the last output projection.
    residual : (N, hidden), the residual stream to which its output is added.
    targets : (N,) long.
    """

    attended: Tensor
    residual: Tensor
    targets: Tensor


def train_clients(
    base: Base,
    clients: Iterable[Client],
    folder: Path | str,
    *,
    seed: int,
    recipe: Recipe | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Train each client's LoRA adapter and save it as a PEFT adapter folder, ``folder/<client name>``.

    Parameters
    ----------
    folder : parent of the adapter folders; adapters of the same names are replaced.
    seed : every client's data and initial factors are drawn from it and from the client's name.
    progress : called with a client's name when its adapter is saved.

    Returns
    -------
    list of Path
        The adapter folders, in the clients' order.

    Raises
    ------
    FileExistsError
        `folder` holds something other than these clients' adapters, which would be taken for a client later
        on.
    """
    clients, folder = list(clients), Path(folder)
    names = {client.name for client in clients}
    strangers = sorted({entry.name for entry in folder.iterdir()} - names) if folder.is_dir() else []
    if strangers:
        raise FileExistsError(f"{folder} holds {strangers[0]!r}, none of the clients; choose another")
    for client in clients:
        model = train_client(base, client, seed=seed, recipe=recipe)
        # save_embedding_layers="auto" would ask the Hugging Face hub about the base model
        model.save_pretrained(str(folder / client.name), save_embedding_layers=False)
        if progress is not None:
            progress(client.name)
    return [folder / client.name for client in clients]


def train_client(base: Base, client: Client, *, seed: int, recipe: Recipe | None = None) -> peft.PeftModel:
    """One client's adapter, trained on its own sequences with label noise."""
    recipe = recipe or Recipe()
    model = add_adapter(base, recipe, generator=derive(seed, client.name, "adapter"))
    draws = derive(seed, client.name, "training")
    batch = client_batch(client, recipe.sequences, generator=draws, label_noise=recipe.label_noise)
    prefix = run_prefix(model, batch)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=recipe.learning_rate)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        cross_entropy(run_suffix(model, prefix), prefix.targets).backward()
        optimizer.step()
    return model


def add_adapter(base: Base, recipe: Recipe, *, generator: torch.Generator) -> peft.PeftModel:
    """A copy of the base model with a fresh LoRA adapter: B = 0, A drawn from `generator` by peft's law.

    Clients draw different A, since a common one would align the adapters' row side, contaminated ones
    included.
    """
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=["o_proj"],
        layers_to_transform=[base.model.config.num_hidden_layers - 1],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws an A from the global generator; it is replaced below
        model = peft.get_peft_model(copy.deepcopy(base.model), config)
    nn.init.kaiming_uniform_(adapted_module(model).lora_A["default"].weight, a=5**0.5, generator=generator)
    return model


def adapted_module(model: nn.Module) -> Any:
    """The module that is adapted, the last layer's attention output projection, of a base or PEFT model."""
    return _llama(model).model.layers[-1].self_attn.o_proj


def _llama(model: nn.Module) -> Any:  # LlamaForCausalLM: torch types its parts as Tensor | Module
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


@torch.no_grad()
def run_prefix(model: nn.Module, batch: Batch) -> Prefix:
    """Run the model once and keep what enters the adapted module; the adapter has no influence on that."""
    seen: dict[str, Tensor] = {}
    layer, module = _llama(model).model.layers[-1], adapted_module(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.update(residual=inputs[0])),
        module.register_forward_pre_hook(lambda _, inputs: seen.update(attended=inputs[0])),
    ]
    try:
        model(batch.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    labelled = batch.targets != copying.NO_TARGET
    return Prefix(seen["attended"][labelled], seen["residual"][labelled], batch.targets[labelled])


def run_suffix(model: nn.Module, prefix: Prefix) -> Tensor:
    """Logits (N, V): output projection, residual, MLP, norm, head, which treat each position by itself."""
    llama = _llama(model)
    layer = llama.model.layers[-1]
    stream = prefix.residual + layer.self_attn.o_proj(prefix.attended)
    stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    return llama.lm_head(llama.model.norm(stream))


def updated_model(base: Base, update: Tensor | Path | str | None) -> nn.Module:
    """A copy of the base model with an update of the adapted module.

    Parameters
    ----------
    update : None, a dense matrix (hidden, hidden), or a PEFT adapter folder, which peft itself loads.
    """
    model: nn.Module = copy.deepcopy(base.model)
    if isinstance(update, Tensor):
        weight = adapted_module(model).weight
        weight.data += update.to(weight)
    elif update is not None:
        model = peft.PeftModel.from_pretrained(model, str(update))
    return model.eval()


def adapter_update(model: nn.Module) -> Tensor:
    """The dense update (hidden, hidden) of a PEFT model's adapted module, computed by peft: scale * B @ A."""
    return adapted_module(model).get_delta_weight("default").detach()


@torch.no_grad()
def evaluate_update(
    base: Base, update: Tensor | Path | str | None, client: Client, *, seed: int, count: int = 200
) -> Accuracy:
    """Teacher-forced accuracy of an update for a client, on fresh sequences with clean labels of its dialect.

    Every update is judged on the same sequences. `update` is as in `updated_model`; `count` is a number of
    sequences.
    """
    batch = client_batch(client, count, generator=derive(seed, client.name, "evaluation"))
    model = updated_model(base, update)
    prefix = run_prefix(model, batch)
    return copying.copy_accuracy(run_suffix(model, prefix), prefix.targets, client.dialect.symbols)


@torch.no_grad()
def evaluate_free_running(
    base: Base, update: Tensor | Path | str | None, client: Client, *, seed: int, count: int = 100
) -> float:
    """As `evaluate_update`, but the model copies from its own output, read back through the dialect."""
    batch = client_batch(client, count, generator=derive(seed, client.name, "free running"))
    model = updated_model(base, update)
    return copying.free_running_accuracy(lambda tokens: model(tokens).logits, batch, client.dialect.read)
