"""Fine-tuning from clients' data to their adapters and a report: ``clair train``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clairlib.core import provenance
from clairlib.core.files import REPORT, whole_folder
from clairlib.training.client_data import Tokens, data_files, hold_out, read_client
from clairlib.training.preparation import GROUP_TOKENS, Memory, memory_needed
from clairlib.training.saving import TrainedClient, save_adapters
from clairlib.training.schedule import ClientData, Schedule
from clairlib.training.targets import target_names
from clairlib.training.trainer import train_adapters

MAX_LENGTH = 512  # most tokens of an example, unless the model takes fewer
CAUSAL, CLASSIFIER = ("ForCausalLM", "LMHeadModel"), "ForSequenceClassification"


@dataclass(frozen=True)
class Settings:
    """Training settings, the same for all clients.

    Attributes
    ----------
    targets, rank, alpha, use_rslora
        Adapted modules, and rank and scale of the adapters, as in peft.
    epochs, steps : int or None
        Passes over a client's examples, and the largest number of its optimiser steps. At least one must be given.
    batch, learning_rate
        Examples per step, and AdamW's learning rate.
    validation : float
        Fraction of each client's examples that is held out. The adapter with the least loss on them is kept.
    max_length : int or None
        Most tokens of an example; the rest is cut off. None: MAX_LENGTH, or the model's limit if that is lower.
    group_tokens : int
        Most tokens that go through the model together.
    bf16 : bool
        Whether products are in bfloat16 (on CUDA only).
    """

    targets: Sequence[str] | str = ("o_proj", "down_proj")
    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    epochs: int | None = 3
    steps: int | None = None
    batch: int = 8
    learning_rate: float = 2e-4
    validation: float = 0.2
    max_length: int | None = None
    group_tokens: int = GROUP_TOKENS
    device: str = "cpu"
    bf16: bool = False
    seed: int = 0

    @property
    def schedule(self) -> Schedule:
        """The schedule for the trainer."""
        steps = sys.maxsize if self.steps is None else self.steps
        return Schedule(steps=steps, epochs=self.epochs, batch=self.batch, learning_rate=self.learning_rate)


@dataclass(frozen=True)
class Finetuning:
    """Each client's training, the contents of report.json, and the output folder."""

    trained: list[TrainedClient]
    report: dict[str, Any]
    output: Path


def finetune(
    folder: str | Path, base: str, output: str | Path, settings: Settings, *, resume: bool = False,
    overwrite: bool = False, announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuning:  # fmt: skip
    """Train an adapter for every client of a folder, all at once, and write them as PEFT adapter folders.

    Until the output appears, a checkpoint lies beside it (``.OUTPUT.checkpoint``).

    Parameters
    ----------
    folder : path
        A folder or .jsonl file per client, with lines as in :func:`clairlib.training.client_data.read_client`.
    base : str
        Name or path of a causal language model or sequence classifier, saved as safetensors with its tokenizer. A
        classifier must have its head, because only adapters are trained.
    output : path
        Folder to write; it appears whole or not at all. A client whose training diverged has no adapter in it.
    resume : bool
        Go on from the checkpoint, if there is one, with the same result.
    overwrite : bool
        Replace an output folder that an earlier call wrote.
    announce : callable, optional
        Called before training starts, with one line that states the memory needed.
    progress : callable, optional
        Called with the number of steps done and their total, over all clients.

    Raises
    ------
    ValueError
        A client, line, module, option or file cannot be used; one line names it. The output is not touched.
    OSError
        The frozen part's activations fit neither into memory nor on the disk.
    """
    folder, output = Path(folder), Path(output)
    checkpoint = output.absolute().parent / f".{output.name}.checkpoint"
    _check(settings, folder, output, overwrite)
    if checkpoint.exists() and not resume:
        raise ValueError(f"an unfinished run left {str(checkpoint)!r}; pass --resume to go on from it, or remove it")
    files = data_files(folder)
    model, tokenizer = load_base(base)
    tokens = _read(files, model, tokenizer, settings)
    clients = []
    for name, own in tokens.items():
        kept, held = hold_out(name, own.examples, settings.validation, seed=settings.seed)
        clients.append(ClientData(name, kept, settings.rank, settings.alpha, settings.use_rslora, held))
    autocast, job = torch.bfloat16 if settings.bf16 else None, (model, clients, settings.targets, settings.schedule)
    how: dict[str, Any] = {"device": settings.device, "autocast": autocast, "group_tokens": settings.group_tokens}
    memory = memory_needed(*job, **how)
    if announce is not None:
        announce(f"{len(clients)} clients; {memory}")
    try:
        trained = train_adapters(*job, seed=settings.seed, checkpoint=checkpoint, progress=progress, **how)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory on device {settings.device}; lower --group-tokens") from error
    if all(client.status == "diverged" for client in trained):
        checkpoint.unlink()
        raise ValueError(f"every client's loss diverged at learning rate {settings.learning_rate:g}; lower it")
    with whole_folder(output, overwrite=overwrite, inputs=[folder]) as fresh:
        save_adapters(model, trained, fresh)
        report = _report(model, clients, tokens, trained, memory, settings)
        (fresh / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    checkpoint.unlink()
    return Finetuning(trained, report, output)


class _Untouched(Exception):
    """Raised to leave `whole_folder` before anything appears."""


def _check(settings: Settings, folder: Path, output: Path, overwrite: bool) -> None:
    """Refuse early what would otherwise fail after hours of training."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here; use --device cpu")
    if settings.bf16 and settings.device != "cuda":
        raise ValueError("bfloat16 products are for --device cuda only")
    if not 0 <= settings.validation < 1:
        raise ValueError(f"the share held back for validation must lie in [0, 1), got {settings.validation:g}")
    with suppress(_Untouched), whole_folder(output, overwrite=overwrite, inputs=[folder]):
        raise _Untouched


def load_base(name: str) -> tuple[Any, Any]:
    """Load a model, in the precision of its checkpoint, and its tokenizer.

    Only safetensors files are read, and no code of the checkpoint is run.

    Raises
    ------
    ValueError
        The model cannot be loaded, is of another kind, or its checkpoint lacks the head.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = next(iter(config.architectures or ()), "model without a head")
        if not kind.endswith((*CAUSAL, CLASSIFIER)):
            raise ValueError(f"it is a {kind}; only causal language models and sequence classifiers are trained")
        auto: Any = AutoModelForSequenceClassification if kind.endswith(CLASSIFIER) else AutoModelForCausalLM
        options = {"config": config, "use_safetensors": True, "trust_remote_code": False}
        model, found = auto.from_pretrained(name, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        # without a folder of this name transformers asks the Hugging Face hub
        where = "" if Path(name).is_dir() else "; if the hub cannot be reached, give the folder of a saved model"
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"model {name!r} cannot be loaded: {reason}{where}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"model {name!r}: its checkpoint lacks {missing[0]!r}, and adapters alone are trained")
    return model, tokenizer


def _read(files: Mapping[str, list[Path]], model: Any, tokenizer: Any, settings: Settings) -> dict[str, Tokens]:
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    length = settings.max_length or min(MAX_LENGTH, room)
    if length > room:
        raise ValueError(f"--max-length {length} is more than the {room} tokens that the model takes")
    classes = model.config.label2id if model.loss_type == CLASSIFIER else None
    options: dict[str, Any] = {"max_length": int(length), "classes": classes}
    return {name: read_client(name, own, tokenizer, **options) for name, own in files.items()}


def _report(
    model: Any, clients: Sequence[ClientData], tokens: Mapping[str, Tokens], trained: Sequence[TrainedClient],
    memory: Memory, settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    entries = [
        {
            "name": client.name, "status": client.status, "diverged_at": client.diverged_at,
            "examples": len(data.examples), "validation_examples": len(data.validation),
            "cut_off": tokens[client.name].truncated, "steps": len(client.losses), "best_step": client.best_step,
            "losses": [loss if math.isfinite(loss) else None for loss in client.losses.tolist()],
        }  # fmt: skip
        for client, data in zip(trained, clients, strict=True)
    ]
    shapes = {name: list(model.get_submodule(name).weight.shape) for name in target_names(model, settings.targets)}
    modules = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    report = {"clients": entries, "modules": modules, "settings": {"model": model.name_or_path} | asdict(settings)}
    return report | {"memory": asdict(memory), "provenance": provenance.collect()}
