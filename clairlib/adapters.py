"""The clients' PEFT adapters, all of them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clairlib.adapter_files import RESERVED, blaming, client_folders, open_adapters
from clairlib.factors import LowRank

__all__ = ["RESERVED", "AdapterSet", "blaming", "client_folders", "load_adapters"]


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of K clients on one base model.

    Attributes
    ----------
    names : list[str]
        Client names (the folders' names), K of them; the order of everything else.
    folders : list[Path]
        Where each came from.
    configs : list[dict]
        Each client's adapter_config.json.
    modules : dict[str, list[LowRank]]
        Module name (without PEFT's ``base_model.model.``) -> the K updates, in the dtype of the files.
    """

    names: list[str]
    folders: list[Path]
    configs: list[dict[str, Any]]
    modules: dict[str, list[LowRank]]


def load_adapters(paths: Sequence[str | Path]) -> AdapterSet:
    """Read the clients' adapters and check that they can be compared.

    Parameters
    ----------
    paths : sequence of path
        Adapter folders (adapter_config.json, adapter_model.safetensors), or one parent folder of them.

    Raises
    ------
    AdapterError
        One line naming the client and what is wrong with its folder, or how it differs from the others.
    """
    files = open_adapters(paths)
    modules = {module: files.read(module) for module in files.modules}
    return AdapterSet(files.names, files.folders, files.configs, modules)
