"""``clair synth``: write planted adapters with the shapes of a real model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from clairlib.cli.console import progress, stop, terminable
from clairlib.cli.options import Model, QuietFlag

# KINDS and DTYPES of clairlib.simulate.adapters, which would import torch
Kind = StrEnum("Kind", ["unstructured", "coalition", "sign_flip", "scaled", "stealth", "free_rider"])
Dtype = StrEnum("Dtype", ["bfloat16", "float16", "float32", "float64"])


def synth(
    output: Annotated[Path, Argument(help="Folder to write; it appears whole or not at all.")],
    model: Annotated[Model | None, Option(help="Shapes of this model's modules; or give --shape.")] = None,
    shape: Annotated[tuple[int, int] | None, Option(metavar="P Q", help="Outputs and inputs of every module.")] = None,
    modules: Annotated[
        str | None, Option(help="Projections, with commas; default: all with --model, o_proj with --shape.")
    ] = None,
    layers: Annotated[
        int | None, Option(min=1, help="Layers with adapters; default: all with --model, one with --shape.")
    ] = None,
    clients: Annotated[int, Option(help="Number of clients.")] = 16,
    rank: Annotated[int, Option(help="Rank of the adapters.")] = 16,
    shared_rank: Annotated[int, Option(help="Dimension of the benign clients' subspace.")] = 4,
    contaminated: Annotated[int, Option(help="Number of contaminated clients.")] = 0,
    kind: Annotated[Kind, Option(help="Attack of the contaminated clients.")] = Kind.unstructured,
    noise: Annotated[float, Option(help="Norm of a client's noise; its own part has sqrt(shared rank).")] = 1.0,
    distance: Annotated[float, Option(help="Norm of a stealth step off the subspace.")] = 1.0,
    own_steps: Annotated[bool, Option("--own-steps", help="Each client makes its own stealth step.")] = False,
    dtype: Annotated[Dtype, Option(help="Dtype of the files.")] = Dtype.bfloat16,
    seed: Annotated[int, Option(help="Seed of everything planted.")] = 0,
    quiet: QuietFlag = False,
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
                output, plan, model=model and model.value, shape=shape, layers=layers,
                modules=None if modules is None else modules.split(","),
                progress=lambda done, total: bar(completed=done, total=total),
            )  # fmt: skip
    except AdapterError as error:
        stop(error)
    if not quiet:
        count, size = len(truth["modules"]), truth["bytes"] / 1e6
        each = f"{count} module" if count == 1 else f"{count} modules"
        typer.echo(f"{clients} adapters of {each}, {size:.3g} MB; written to {output / 'clients'}")
        names = ", ".join(truth["contaminated"]) or "none"
        typer.echo(f"contaminated: {names}; the truth is in {output / 'truth.json'}")
