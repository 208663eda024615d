"""``clair synth``: write planted adapters with the shapes of a real model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clairlib.cli.console import progress, stop, terminable


class Kind(StrEnum):
    unstructured = "unstructured"
    coalition = "coalition"
    sign_flip = "sign_flip"
    scaled = "scaled"
    stealth = "stealth"
    free_rider = "free_rider"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class Model(StrEnum):
    llama = "llama-2-7b"
    qwen = "qwen2.5-0.5b"


def synth(
    output: Annotated[Path, typer.Argument(help="Folder to write; it appears whole or not at all.")],
    model: Annotated[Model | None, typer.Option(help="Shapes of this model's modules; or give --shape.")] = None,
    shape: Annotated[
        tuple[int, int] | None, typer.Option(metavar="P Q", help="Outputs and inputs of every module.")
    ] = None,
    modules: Annotated[
        str | None, typer.Option(help="Projections, with commas; default: all with --model, o_proj with --shape.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers with adapters; default: all with --model, one with --shape.")
    ] = None,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 16,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    shared_rank: Annotated[int, typer.Option(help="Dimension of the benign clients' subspace.")] = 4,
    contaminated: Annotated[int, typer.Option(help="Number of contaminated clients.")] = 0,
    kind: Annotated[Kind, typer.Option(help="Attack of the contaminated clients.")] = Kind.unstructured,
    noise: Annotated[float, typer.Option(help="Norm of a client's noise; its own part has sqrt(shared rank).")] = 1.0,
    distance: Annotated[float, typer.Option(help="Norm of a stealth step off the subspace.")] = 1.0,
    own_steps: Annotated[bool, typer.Option("--own-steps", help="Each client makes its own stealth step.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the files.")] = Dtype.bfloat16,
    seed: Annotated[int, typer.Option(help="Seed of everything planted.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Write planted LoRA adapters to OUTPUT/clients, for `clair align`, and the ground truth to OUTPUT/truth.json."""
    from clairlib.core.files import AdapterError
    from clairlib.simulate import Plan, synthesise

    plan = Plan(
        clients=clients, rank=rank, shared_rank=shared_rank, kind=kind.value, contaminated=contaminated, noise=noise,
        distance=distance, in_common=not own_steps, dtype=dtype.value, seed=seed,
    )  # fmt: skip
    try:
        with terminable(), progress("writing adapters", quiet=quiet) as bar:
            truth = synthesise(
                output,
                plan,
                model=None if model is None else model.value,
                shape=shape,
                modules=None if modules is None else modules.split(","),
                layers=layers,
                progress=lambda done, total: bar(completed=done, total=total),
            )
    except AdapterError as error:
        stop(error)
    if not quiet:
        count, size = len(truth["modules"]), truth["bytes"] / 1e6
        each = f"{count} module" if count == 1 else f"{count} modules"
        typer.echo(f"{clients} adapters of {each}, {size:.3g} MB; written to {output / 'clients'}")
        names = ", ".join(truth["contaminated"]) or "none"
        typer.echo(f"contaminated: {names}; the truth is in {output / 'truth.json'}")
