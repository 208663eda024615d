"""Benchmark of the batched trainer against peft one client after the other, side by side in one run.

Both sides train the same adapters on the same data from the same start, and their losses must agree. The time runs from
set-up to the last step. The lower bound (``floor``) of both is that of `clairlib.bench.lower_bound`.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from clairlib.bench import lower_bound
from clairlib.bench.cases import ALPHA, EXPLANATION, RANK, Case, data_of, model_of
from clairlib.bench.lower_bound import Work
from clairlib.core import provenance
from clairlib.core.files import write_atomically
from clairlib.core.seeds import derive
from clairlib.training import ClientData, Schedule, train_adapters
from clairlib.training.schedule import NO_LABEL

LEARNING_RATE = 3e-4  # at 3e-3 training on random tokens is unstable: rounding errors grow tenfold
AGREE = 1e-3  # relative difference of the two sides' losses in float32; a wrong gradient shows within a few steps
SHOWN = (
    "base", "targets", "clients", "tokens", "steps", "sequential_rate", "batched_rate", "speed", "sequential_mb",
    "batched_mb", "floor_gflops", "sequential_to_floor", "batched_to_floor",
)  # fmt: skip


def measure(case: Case, *, repeats: int = 2, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Measure rates, memory and lower bound of one case.

    The two sides alternate, and the best of ``repeats`` runs counts. On the CPU one thread is used and its processor
    time is measured, so other work on the machine does not count.

    Returns
    -------
    dict
        The case, and the number of ``labels`` in a client's batch. ``sequential_`` and ``batched_`` precede the values
        of each side: ``seconds``, ``rate`` (clients x steps / second), ``mb`` (10^6 bytes at the peak beyond what was
        held before; None if it cannot be read) and ``to_floor`` (seconds / floor_seconds). ``speed`` is
        sequential_seconds / batched_seconds. ``floor_flops``, ``_seconds`` and ``_gflops`` are the lower bound.
        ``difference`` is the largest difference of the two sides' losses, relative to a client's first loss.

    Raises
    ------
    ValueError
        CUDA is not available.
    RuntimeError
        The losses of the two sides differ by more than AGREE.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available here; use --device cpu")
    model, targets = model_of(case, seed=seed)
    data = data_of(case, model.config.vocab_size, seed=seed)
    model.to(device)
    schedule = Schedule(steps=case.steps, learning_rate=LEARNING_RATE)
    runs: dict[str, list[tuple[Tensor, float, int | None]]] = {"sequential": [], "batched": []}
    with one_thread():
        for _ in range(repeats):
            for side, train in (("sequential", _sequential), ("batched", _batched)):
                run = partial(train, model, data, targets, schedule, seed=seed, device=device)
                runs[side].append(watched(run, device))
        own = data[0].examples
        labels = sum(int((example["labels"][1:] != NO_LABEL).sum()) for example in own)
        work = Work(case.clients, len(own), len(own[0]["input_ids"]), labels, RANK, case.steps)
        products = lower_bound.needed_products(model, targets, work)
        least, flops = lower_bound.seconds(products, device), lower_bound.flops(products)
    expected, found = (results[0][0] for results in runs.values())  # losses (K, steps)
    difference = float(((found - expected).abs() / expected[:, :1]).max())
    if not difference <= AGREE:
        raise RuntimeError(f"the two sides' losses differ by {difference:.2g} in {case}")
    row = asdict(case) | {"labels": labels, "difference": difference}
    for side, results in runs.items():
        seconds = min(seconds for _, seconds, _ in results)
        peaks = [peak for *_, peak in results if peak is not None]
        row |= {f"{side}_seconds": seconds, f"{side}_rate": case.clients * case.steps / seconds}
        row |= {f"{side}_to_floor": seconds / least, f"{side}_mb": max(peaks) / 1e6 if peaks else None}
    row["speed"] = row["sequential_seconds"] / row["batched_seconds"]
    return row | {"floor_flops": flops, "floor_seconds": least, "floor_gflops": flops / least / 1e9}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread within this context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batched(model: Any, data: list[ClientData], targets: list[str], schedule: Schedule, **how: Any) -> Tensor:
    """Train with the batched trainer and return the losses (K, steps)."""
    trained = train_adapters(model, data, targets, schedule, **how)
    return torch.stack([client.losses for client in trained])


def _sequential(
    model: Any, data: list[ClientData], targets: list[str], schedule: Schedule, *, seed: int, device: str
) -> Tensor:
    """Train one client after the other with peft, with whole passes, and return the losses (K, steps)."""
    losses = torch.zeros(len(data), schedule.steps, device=device)
    for k, client in enumerate(data):
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config).eval()  # no dropout on either side
        for name in targets:
            A = model.get_submodule(name).lora_A["default"].weight
            A.data.copy_(initial_factor(A, derive(seed, client.name, name)))
        ids, labels = (torch.stack([e[key] for e in client.examples]).to(device) for key in ("input_ids", "labels"))
        trained = [w for w in adapted.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
        for step in range(schedule.steps):
            optimizer.zero_grad()
            loss = adapted(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[k, step] = loss.detach()  # small tensors kept between large ones would keep the heap from shrinking
        adapted.unload()
    return losses.double().cpu()


def initial_factor(A: Tensor, draws: torch.Generator) -> Tensor:
    """Draw the A that the trainer draws."""
    return nn.init.kaiming_uniform_(torch.empty(A.shape), a=math.sqrt(5), generator=draws)


def watched(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float, int | None]:
    """Run a side; return its result, its seconds, and its peak of bytes beyond those held before."""
    gc.collect()
    before, began = _reset_peak(device), lower_bound.now(device)
    result = run()
    seconds = lower_bound.now(device) - began
    if before is None:
        return result, seconds, None
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")
    return result, seconds, None if after is None else after - before


def _reset_peak(device: str) -> int | None:
    """Restart the record of peak memory and return the bytes held now; None if there is no such record."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return the memory that earlier runs freed to the system
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # another C library, or not allowed here
        return None
    return _resident("VmRSS")


def _resident(key: str) -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def write(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Write ``stem.csv``, and ``stem.json`` with provenance. Each file appears whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    record = {"what": EXPLANATION, "rows": list(rows), "provenance": provenance.collect()}
    texts = {".csv": table.getvalue(), ".json": json.dumps(record, indent=1, allow_nan=False) + "\n"}
    for suffix, text in texts.items():
        with write_atomically(stem.with_name(stem.name + suffix)) as file:
            file.write_text(text, encoding="utf-8")
