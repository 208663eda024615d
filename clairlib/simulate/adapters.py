"""Planted LoRA adapters with the shapes of a real model, written as PEFT folders, to try and time ``clair align``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from clairlib.adapters.folder import write_lora
from clairlib.core.files import AdapterError, whole_folder
from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import LowRank
from clairlib.simulate.attacks import SCALED_BY, random_frame

CLIENTS, TRUTH = "clients", "truth.json"
KINDS = ("unstructured", "coalition", "sign_flip", "scaled", "stealth", "free_rider")  # a part of attacks.ATTACKS
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
BYTE_SPREAD = (256**2 - 1) / 12  # variance of a uniform byte
HEADER = 2**16  # bytes of disk reserved for each adapter's configuration and header


@dataclass(frozen=True)
class Architecture:
    """Layer widths of a decoder (``key_value``: outputs of k_proj and v_proj) and its number of layers."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the weight shape (p, q), outputs and inputs, of every projection by its name."""
        hidden, small, wide = self.hidden, self.key_value, self.intermediate
        square = {"q_proj": (hidden, hidden), "k_proj": (small, hidden), "v_proj": (small, hidden)}
        mlp = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
        return square | {"o_proj": (hidden, hidden)} | mlp


MODELS = {
    "llama-2-7b": Architecture(hidden=4096, key_value=4096, intermediate=11008, layers=32),
    "qwen2.5-0.5b": Architecture(hidden=896, key_value=128, intermediate=4864, layers=24),
}
PROJECTIONS = tuple(MODELS["llama-2-7b"].shapes())


@dataclass(frozen=True)
class Plan:
    """Parameters of the planted adapters.

    ``contaminated`` of the K ``clients`` send the attack ``kind``. ``rank`` is the adapter rank rho, ``shared_rank`` is
    the dimension r of the shared subspace, ``noise`` is the size of the estimation noise E_k, ``distance`` that of a
    stealth step. Sizes are Frobenius norms in units of a row of A_k, whose expected squared norm is one. With
    ``in_common`` all contaminated clients make the stealth step in one direction, otherwise each in its own.
    """

    clients: int = 16
    rank: int = 16
    shared_rank: int = 4
    kind: str = "unstructured"
    contaminated: int = 0
    noise: float = 1.0
    distance: float = 1.0
    in_common: bool = True
    dtype: str = "bfloat16"
    seed: int = 0

    def names(self) -> list[str]:
        """Return the clients' names, all of the same length."""
        digits = max(3, len(str(self.clients - 1)))
        return [f"client_{k:0{digits}}" for k in range(self.clients)]

    def bad(self) -> set[str]:
        """Draw the names of the contaminated clients from the seed."""
        order = torch.randperm(self.clients, generator=derive(self.seed, "places")).tolist()
        return {self.names()[k] for k in order[: self.contaminated]}


@dataclass(frozen=True)
class PlantedModule:
    """Basis U (p, r) and common part M (p, q), of rank one and Frobenius norm one, of the clients of one frame."""

    basis: Tensor
    common_part: LowRank


def synthesise(
    output: str | Path, plan: Plan, *, model: str | None = None, shape: tuple[int, int] | None = None,
    modules: Sequence[str] | None = None, layers: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write planted PEFT adapters to ``output``/clients and their ground truth to ``output``/truth.json.

    In every module a benign client has the update Theta_k = M + U A_k + E_k. M = C d, of rank one, and U (p, r) are the
    same for all benign clients but differ between modules; A_k (r, q) is the client's own. The adapter's factors are
    B = [C, U, 0] + N_k and A = [d; A_k; W_k], of rank exactly rho (r + 1 without noise): the rho - r - 1 own rows W_k
    carry estimation noise only. The noise E_k = N_k A has rho rank-one terms of expected squared norm noise^2 / rho
    each. A random rotation between the factors mixes their columns, as training would.

    A contaminated client sends an adapter of the same rank, which depends on the plan's ``kind``:

    * ``unstructured``, ``coalition``: a U and an M of its own, or shared by all contaminated clients;
    * ``stealth``: its honest update plus a step u d of norm ``distance``, with the unit column u orthogonal to U;
    * ``sign_flip``, ``scaled``: its honest update times -1, or times 10; ``free_rider``: B = 0, as before training.

    The random values of a client in a module depend only on the seed and on these two names. One adapter is in memory
    at a time. bfloat16 rounds each factor, and with it the planted subspace, by about 0.1 %.

    Parameters
    ----------
    model, shape : str, (p, q)
        Either a key of ``MODELS``, or the shape of every module.
    modules : sequence of str, optional
        Names from ``PROJECTIONS``. Default: all projections with ``model``, o_proj alone with ``shape``.
    layers : int, optional
        Number of layers with adapters, counted from the first. Default: all layers with ``model``, one with ``shape``.
    progress : callable, optional
        Called with (clients written, number of clients).

    Returns
    -------
    dict
        Contents of truth.json: plan, module shapes, names of benign and of contaminated clients, size in bytes.

    Raises
    ------
    AdapterError
        The plan or the shapes are invalid, the output exists, or the disk is too small. The message is one line.
    """
    output = Path(os.path.abspath(output))
    _check_plan(plan)
    shapes = module_shapes(model, shape, modules, layers)
    for module, sides in shapes.items():
        if plan.rank > min(sides):
            raise AdapterError(f"rank {plan.rank} is larger than module {module!r} allows, {min(sides)}")
    size = plan.clients * sum(plan.rank * sum(sides) for sides in shapes.values()) * DTYPES[plan.dtype].itemsize
    _check_room(output, size + plan.clients * HEADER)
    config = {"base_model_name_or_path": f"{model} shape, planted" if model else "planted", "task_type": "CAUSAL_LM"}
    names, bad = plan.names(), plan.bad()
    shared = {module: shared_part(plan, module, sides) for module, sides in shapes.items()}
    with whole_folder(output) as folder:
        (folder / CLIENTS).mkdir()
        for done, name in enumerate(names, start=1):
            write_lora(folder / CLIENTS / name, config, dict(_updates(plan, name, name in bad, shapes, shared)))
            if progress is not None:
                progress(done, len(names))
        groups = {"contaminated": sorted(bad), "benign": [name for name in names if name not in bad]}
        truth = {"plan": asdict(plan), "model": model, "modules": shapes, "bytes": size} | groups
        (folder / TRUTH).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return truth


def module_shapes(
    model: str | None, shape: tuple[int, int] | None, modules: Sequence[str] | None, layers: int | None
) -> dict[str, tuple[int, int]]:
    """Return the shape (p, q) of every module by its full name, layer by layer.

    Raises
    ------
    AdapterError
        Neither or both of ``model`` and ``shape`` are given, or a name or the number of layers is not possible.
    """
    if (model is None) == (shape is None):
        raise AdapterError(f"give a model, one of {', '.join(MODELS)}, or a shape p, q")
    if model is not None and model not in MODELS:
        raise AdapterError(f"model must be one of {', '.join(MODELS)}; got {model!r}")
    if model is not None:
        own, most = MODELS[model].shapes(), MODELS[model].layers
        layers = most if layers is None else layers
        if layers > most:
            raise AdapterError(f"model {model!r} has {most} layers; got {layers}")
    else:
        assert shape is not None
        own, layers, modules = dict.fromkeys(PROJECTIONS, shape), 1 if layers is None else layers, modules or ["o_proj"]
    chosen = list(own) if modules is None else list(dict.fromkeys(modules))
    if unknown := [name for name in chosen if name not in own]:
        raise AdapterError(f"module {unknown[0]!r} is none of {', '.join(own)}")
    if layers < 1 or not chosen or min(min(own[name]) for name in chosen) < 1:
        raise AdapterError("at least one layer, one module, one row and one column are needed")
    full = {name: f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in chosen}
    return {f"model.layers.{i}.{full[name]}": own[name] for i in range(layers) for name in chosen}


def shared_part(plan: Plan, module: str, shape: tuple[int, int], *, of: str = "benign") -> PlantedModule:
    """Return U and M of one module, before rounding, ``of`` the "benign", the "coalition", or the client of a name."""
    generator = derive(plan.seed, "shared", module, of)
    (p, q), precision = shape, torch.float64 if plan.dtype == "float64" else torch.float32
    frame = random_frame(p, plan.shared_rank + 1, generator=generator).to(precision)
    row = _directions(1, q, generator, precision)
    return PlantedModule(frame[:, :-1], LowRank(frame[:, -1:], row / torch.linalg.vector_norm(row)))


def _updates(
    plan: Plan, name: str, bad: bool, shapes: dict[str, tuple[int, int]], shared: dict[str, PlantedModule]
) -> Iterator[tuple[str, LowRank]]:
    """Yield (module, update) of one client for every module, in the dtype of the file."""
    for module, sides in shapes.items():
        generator = derive(plan.seed, "client", module, name)
        own = shared[module]
        if bad and plan.kind in ("unstructured", "coalition"):
            own = shared_part(plan, module, sides, of=name if plan.kind == "unstructured" else "coalition")
        B, A = _factors(plan, own, generator)
        if bad and plan.kind == "stealth":
            source = derive(plan.seed, "step", module, "all" if plan.in_common else name)
            B[:, :1] += plan.distance * _off(own.basis, source)
        B = B * ({"sign_flip": -1.0, "scaled": SCALED_BY, "free_rider": 0.0}.get(plan.kind, 1.0) if bad else 1.0)
        rotation = torch.linalg.qr(torch.randn(plan.rank, plan.rank, generator=generator, dtype=B.dtype)).Q
        dtype = DTYPES[plan.dtype]
        yield module, LowRank((B @ rotation).to(dtype), (rotation.T @ A).to(dtype))


def _factors(plan: Plan, shared: PlantedModule, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return B (p, rho) and A (rho, q) of an honest client: one rank for M, r for U A_k, the rest for noise only."""
    p, q = shared.common_part.shape
    rows = _directions(plan.rank - 1, q, generator, shared.basis.dtype)
    B = plan.noise / plan.rank**0.5 * _directions(plan.rank, p, generator, shared.basis.dtype).T  # (p, rho)
    B[:, :1] += shared.common_part.B
    B[:, 1 : 1 + plan.shared_rank] += shared.basis
    return B, torch.cat([shared.common_part.A, rows])


def _directions(count: int, length: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    """Draw random rows (count, length) of unit expected squared norm.

    The entries are uniform bytes, three times as fast as normal numbers; sums of many entries hide the difference.
    """
    words = torch.empty(-(-count * length // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    entries = words.view(torch.int8)[: count * length].view(count, length).to(dtype)
    return entries.add_(0.5).mul_((BYTE_SPREAD * length) ** -0.5)


def _off(basis: Tensor, generator: Generator) -> Tensor:
    """Draw a random unit column (p, 1) orthogonal to the subspace."""
    column = torch.randn(len(basis), 1, generator=generator, dtype=basis.dtype)
    column = column - basis @ (basis.T @ column)
    return column / torch.linalg.vector_norm(column)


def _check_plan(plan: Plan) -> None:
    if plan.clients < MINIMUM_CLIENTS:
        raise AdapterError(f"at least {MINIMUM_CLIENTS} clients are needed, got {plan.clients}")
    if not 0 <= plan.contaminated < plan.clients:
        raise AdapterError(f"contaminated clients must be 0 to {plan.clients - 1}, got {plan.contaminated}")
    if plan.kind not in KINDS:
        raise AdapterError(f"contamination of adapters must be one of {', '.join(KINDS)}; got {plan.kind!r}")
    if plan.dtype not in DTYPES:
        raise AdapterError(f"dtype must be one of {', '.join(DTYPES)}; got {plan.dtype!r}")
    if not 1 <= plan.shared_rank < plan.rank:
        most = f"1 to {plan.rank - 1} in adapters of rank {plan.rank}, as their common part takes one rank"
        raise AdapterError(f"shared rank must be {most}; got {plan.shared_rank}")
    if not (0 <= plan.noise < float("inf") and 0 < plan.distance < float("inf")):
        raise AdapterError(f"noise (>= 0) and distance (> 0) must be finite; got {plan.noise:g} and {plan.distance:g}")


def _check_room(output: Path, size: int) -> None:
    if os.path.lexists(output):
        raise AdapterError(f"output {str(output)!r} exists; choose another place")
    if not output.parent.is_dir():
        raise AdapterError(f"folder {str(output.parent)!r} does not exist; make it first")
    free = shutil.disk_usage(output.parent).free
    if free < size:
        needed = f"{size / 1e9:.1f} GB are needed in {str(output.parent)!r}, {free / 1e9:.1f} GB are free"
        raise AdapterError(f"{needed}; ask for fewer clients or layers")
