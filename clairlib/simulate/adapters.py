"""Planted adapters of a real model's shape, written as PEFT folders: to try, to time and to test ``clair align``."""

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
KINDS = ("unstructured", "coalition", "sign_flip", "scaled", "stealth", "free_rider")  # of attacks.ATTACKS, as adapters
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
BYTE_SPREAD = (256**2 - 1) / 12  # variance of a uniform byte
HEADER = 2**16  # bytes kept free for each adapter's configuration and header


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder: ``hidden`` and ``intermediate`` size, ``key_value`` outputs of k_proj and v_proj, layers."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Projection -> (p, q), outputs and inputs."""
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
    """What is planted. Sizes are Frobenius norms in units of a row of A_k, whose expected squared norm is one.

    ``clients`` K, ``contaminated`` of them of ``kind``; ``rank`` rho of the adapters, ``shared_rank`` r; ``noise``
    ||E_k||, ``distance`` of a stealth step, which with ``in_common`` all contaminated clients make in one direction.
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
        """Clients' names, of one length."""
        digits = max(3, len(str(self.clients - 1)))
        return [f"client_{k:0{digits}}" for k in range(self.clients)]

    def bad(self) -> set[str]:
        """Names of the contaminated clients, at random places."""
        order = torch.randperm(self.clients, generator=derive(self.seed, "places")).tolist()
        return {self.names()[k] for k in order[: self.contaminated]}


@dataclass(frozen=True)
class PlantedModule:
    """What clients of one frame have in common in a module: ``basis`` U (p, r), ``common_part`` M, rank one, norm one."""

    basis: Tensor
    common_part: LowRank


def synthesise(
    output: str | Path,
    plan: Plan,
    *,
    model: str | None = None,
    shape: tuple[int, int] | None = None,
    modules: Sequence[str] | None = None,
    layers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write ``output``/clients, a PEFT folder for each planted client, and ``output``/truth.json.

    A benign client is Theta_k = M + U A_k + E_k, in factors B = [C, U, 0] + N_k and A = [d; A_k; W_k] of rank rho
    exactly (r + 1 without noise). M = C d has rank one and is the same in all, U (p, r) is shared, the coefficients A_k
    (r, q) are its own, and so are the rho - r - 1 rows W_k, which hold noise alone; the noise is E_k = N_k A, of as
    many rank-one terms as the rank allows, with a squared norm of noise^2 / rho each. U and M differ by module. A
    random rotation between the factors spreads everything over all columns, as training would.

    A contaminated client has, at the same rank, ``unstructured``: a U and an M of its own; ``coalition``: those of the
    coalition; ``stealth``: its honest update and a step u d of norm ``distance``, u off the subspace, its own or that
    of all; ``sign_flip``, ``scaled``: its honest update times -1, times 10; ``free_rider``: B = 0, as before training.

    Values of a client in a module depend on the seed and these two names alone. One adapter is in memory at a time.
    bfloat16 rounds each factor by about 0.1 %, the planted subspace with it.

    Parameters
    ----------
    model : str, optional
        A key of ``MODELS``; or give
    shape : (p, q), optional
        Shape of every module.
    modules : sequence of str, optional
        Of ``PROJECTIONS``; all of a model, o_proj of a shape.
    layers : int, optional
        Layers that have adapters, from the first; all of a model, one of a shape.
    progress : callable, optional
        Called with (clients written, clients).

    Returns
    -------
    dict
        What truth.json says: the plan, module shapes, names of benign and contaminated clients, bytes.

    Raises
    ------
    AdapterError
        One line: the plan cannot be, the output exists, or the disk is too small.
    """
    output = Path(os.path.abspath(output))
    _check_plan(plan)
    shapes = module_shapes(model, shape, modules, layers)
    for module, sides in shapes.items():
        if plan.rank > min(sides):
            raise AdapterError(f"rank {plan.rank} is larger than module {module!r} allows, {min(sides)}")
    size = plan.clients * sum(plan.rank * sum(sides) for sides in shapes.values()) * DTYPES[plan.dtype].itemsize
    _check_room(output, size + plan.clients * HEADER)
    base = "planted" if model is None else f"{model} shape, planted"
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    names, bad = plan.names(), plan.bad()
    shared = {module: shared_part(plan, module, sides) for module, sides in shapes.items()}
    with whole_folder(output) as folder:
        (folder / CLIENTS).mkdir()
        for done, name in enumerate(names, start=1):
            updates = dict(_updates(plan, name, name in bad, shapes, shared))
            write_lora(folder / CLIENTS / name, config, updates)
            if progress is not None:
                progress(done, len(names))
        groups = {"contaminated": sorted(bad), "benign": [name for name in names if name not in bad]}
        truth = {"plan": asdict(plan), "model": model, "modules": shapes, "bytes": size} | groups
        (folder / TRUTH).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return truth


def module_shapes(
    model: str | None, shape: tuple[int, int] | None, modules: Sequence[str] | None, layers: int | None
) -> dict[str, tuple[int, int]]:
    """Module name -> (p, q), layer by layer.

    Raises
    ------
    AdapterError
        Neither or both of model and shape, an unknown name, too many layers.
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
    return {f"model.layers.{i}.{_block(name)}.{name}": own[name] for i in range(layers) for name in chosen}


def shared_part(plan: Plan, module: str, shape: tuple[int, int], *, of: str = "benign") -> PlantedModule:
    """U and M of one module, as planted before rounding; of the benign clients, of a coalition, or of one client."""
    generator = derive(plan.seed, "shared", module, of)
    (p, q), precision = shape, _precision(plan)
    frame = random_frame(p, plan.shared_rank + 1, generator=generator).to(precision)
    row = _directions(1, q, generator, precision)
    return PlantedModule(frame[:, :-1], LowRank(frame[:, -1:], row / torch.linalg.vector_norm(row)))


def _updates(
    plan: Plan, name: str, bad: bool, shapes: dict[str, tuple[int, int]], shared: dict[str, PlantedModule]
) -> Iterator[tuple[str, LowRank]]:
    """A client's update of every module, in the dtype of the file."""
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
    """B (p, rho) and A (rho, q) of an honest client: M first, then U A_k, then what is noise alone."""
    p, q = shared.common_part.shape
    rows = _directions(plan.rank - 1, q, generator, shared.basis.dtype)
    B = plan.noise / plan.rank**0.5 * _directions(plan.rank, p, generator, shared.basis.dtype).T  # (p, rho)
    B[:, :1] += shared.common_part.B
    B[:, 1 : 1 + plan.shared_rank] += shared.basis
    return B, torch.cat([shared.common_part.A, rows])


def _directions(count: int, length: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    """Random rows (count, length) of unit expected squared norm.

    Uniform bytes, at a third of the time of normal numbers: a sum of many entries does not show the difference.
    """
    words = torch.empty(-(-count * length // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    entries = words.view(torch.int8)[: count * length].view(count, length).to(dtype)
    return entries.add_(0.5).mul_((BYTE_SPREAD * length) ** -0.5)


def _off(basis: Tensor, generator: Generator) -> Tensor:
    """Random unit column (p, 1) off the subspace."""
    column = torch.randn(len(basis), 1, generator=generator, dtype=basis.dtype)
    column = column - basis @ (basis.T @ column)
    return column / torch.linalg.vector_norm(column)


def _precision(plan: Plan) -> torch.dtype:
    return torch.float64 if plan.dtype == "float64" else torch.float32


def _block(projection: str) -> str:
    return "self_attn" if projection[0] in "qkvo" else "mlp"


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
        most = f"1 to {plan.rank - 1} in adapters of rank {plan.rank}, of which the common part has one"
        raise AdapterError(f"shared rank must be {most}; got {plan.shared_rank}")
    if not (0 <= plan.noise < float("inf") and 0 < plan.distance < float("inf")):
        raise AdapterError(f"noise and distance must be finite, got {plan.noise:g} and {plan.distance:g}")


def _check_room(output: Path, size: int) -> None:
    if os.path.lexists(output):
        raise AdapterError(f"output {str(output)!r} exists; choose another place")
    if not output.parent.is_dir():
        raise AdapterError(f"folder {str(output.parent)!r} does not exist; make it first")
    free = shutil.disk_usage(output.parent).free
    if free < size:
        needed = f"{size / 1e9:.1f} GB are needed in {str(output.parent)!r}, {free / 1e9:.1f} GB are free"
        raise AdapterError(f"{needed}; ask for fewer clients or layers")
