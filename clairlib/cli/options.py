"""Options and choices that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Option

Device = StrEnum("Device", ["cpu", "cuda"])
Model = StrEnum("Model", {"llama": "llama-2-7b", "qwen": "qwen2.5-0.5b"})  # MODELS of clairlib.simulate.adapters

DeviceOption = Annotated[Device, Option(help="Where to compute.")]
OutputOption = Annotated[Path, Option(help="Folder to write; it appears whole or not at all.")]
OverwriteFlag = Annotated[bool, Option("--overwrite", help="Replace an output folder of an earlier run.")]
QuietFlag = Annotated[bool, Option("--quiet", help="Print nothing but errors.")]
