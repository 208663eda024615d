"""Results of training, and low-rank updates saved by peft as ordinary PEFT adapter folders."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import Tensor

from clairlib.adapters.config import CONFIG, config_for
from clairlib.linalg.low_rank import LowRank
from clairlib.training.grouped_lora import Update
from clairlib.training.suffix import shared_copy
from clairlib.training.targets import loss_kind


@dataclass(frozen=True)
class TrainedClient:
    """Training result of one client.

    Attributes
    ----------
    updates : dict
        Module name -> LowRank, or (p, q) Tensor for full-matrix updates; empty if training diverged.
    losses : Tensor (steps,), float64
        Mean loss over the labels of each step, before the step.
    diverged_at : int or None
        Step, counted from 1, at which training diverged: its loss was not finite or exceeded the bound, or the weights
        after it were not finite.
    best_step : int or None
        With validation examples: the step after which the weights were kept.
    use_rslora : bool
        Whether alpha in the adapter folder is divided by the square root of the rank instead of the rank.
    """

    name: str
    updates: dict[str, Update] = field(repr=False)
    losses: Tensor = field(repr=False)
    diverged_at: int | None = None
    best_step: int | None = None
    use_rslora: bool = False

    @property
    def status(self) -> Literal["trained", "diverged"]:
        """Whether there are updates."""
        return "trained" if self.diverged_at is None else "diverged"


def save_adapters(model: Any, trained: Sequence[TrainedClient], folder: Path | str) -> list[Path]:
    """Write every client's adapter to ``folder/<client's name>``, but for diverged clients; return these folders.

    Each folder appears whole or not at all, and replaces an existing adapter.

    Raises
    ------
    ValueError
        A client has a full-matrix update, which is not an adapter, or another file has its name.
    """
    folder, paths = Path(folder), []
    built: dict[str, peft.PeftModel] = {}
    for client in (client for client in trained if client.status == "trained"):
        options = _options(client)
        key = repr(options)
        if key not in built:
            built = {key: _adapted(model, options)}  # one at a time: each holds factors of every module
        state = {}
        for name, update in client.updates.items():
            assert isinstance(update, LowRank)
            state[f"base_model.model.{name}.lora_A.weight"] = update.A
            state[f"base_model.model.{name}.lora_B.weight"] = update.B
        peft.set_peft_model_state_dict(built[key], state)
        paths.append(folder / client.name)
        _save(built[key], paths[-1])
    return paths


def _options(client: TrainedClient) -> dict[str, Any]:
    """Return rank and alpha for peft's configuration, with patterns if modules differ."""
    alone = {}
    for name, update in client.updates.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"client {client.name!r} has a full-matrix update, which is not an adapter")
        alpha = update.scale * (math.sqrt(update.rank) if client.use_rslora else update.rank)
        alone[name] = LowRank(update.B, update.A, round(alpha, 9) / update.rank)
    options = config_for({}, alone)
    del options["inference_mode"], options["peft_type"]
    return options | {"use_rslora": client.use_rslora}


def _adapted(model: Any, options: dict[str, Any]) -> peft.PeftModel:
    # with another task type peft would also save a classifier's head
    task = "CAUSAL_LM" if loss_kind(model)[0] else None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws an A from the global generator
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # asked by peft
        return peft.get_peft_model(shared_copy(model, "cpu"), peft.LoraConfig(**options, task_type=task))


def _save(adapted: peft.PeftModel, path: Path) -> None:
    """Write beside the target, then rename. An existing adapter is moved aside first and removed afterwards."""
    if os.path.lexists(path) and not (path / CONFIG).is_file():
        raise ValueError(f"{str(path)!r} exists and is no adapter folder; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        # save_embedding_layers="auto" would ask the Hugging Face hub about the base model
        adapted.save_pretrained(str(staging / "new"), save_embedding_layers=False)
        if path.exists():
            os.rename(path, staging / "old")
        os.rename(staging / "new", path)
    except BaseException:
        if (staging / "old").exists() and not path.exists():
            os.rename(staging / "old", path)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
