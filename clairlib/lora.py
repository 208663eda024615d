"""One client's PEFT LoRA folder in and out: adapter_config.json and adapter_model.safetensors.

The folder comes from a client that may be hostile: nothing is unpickled, every declared size is checked
against the file before a tensor is read, and whatever is not a factor of a linear module is refused by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clairlib.factors import LowRank
from clairlib.folders import AdapterError, regular_file
from clairlib.lora_config import CONFIG, config_for, read_config, scales_of

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
LARGEST = 1e30  # norms beyond leave no room for squares in float64 or for a product in float32
DTYPES = ("F64", "F32", "F16", "BF16")
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, LowRank]]:
    """Configuration and updates of one adapter folder, as ``{module: LowRank}`` in the file's dtype.

    With ``fan_in_fan_out`` (Conv1D) PEFT stores the factors in the same orientation, B (out, rho) and
    A (rho, in), and transposes their product when it merges; the update here is always (out, in).

    Raises
    ------
    AdapterError
        One line naming the file, option, module or tensor that cannot be used.
    """
    config = read_config(folder)
    pairs = {module: _pair(module, factors) for module, factors in _read_factors(folder).items()}
    scales = scales_of(config, {module: A.shape[0] for module, (_, A) in pairs.items()})
    updates = {module: LowRank(B, A, scales[module]) for module, (B, A) in pairs.items()}
    for module, update in updates.items():
        b, a = (float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in (update.B, update.A))
        if not max(b, a, abs(update.scale) * b * a) <= LARGEST:
            raise AdapterError(f"module {module!r}: the update is too large, its factors have norms {b:.3g}, {a:.3g}")
    return config, updates


def write_lora(folder: Path, config: dict[str, Any], updates: dict[str, LowRank]) -> None:
    """Write updates as a new adapter folder that ``peft.PeftModel.from_pretrained`` loads.

    Raises
    ------
    AdapterError
        A factor is not finite (its dtype cannot hold the values).
    """
    tensors = {}
    for module, update in updates.items():
        for factor, values in (("A", update.A), ("B", update.B)):
            if not bool(torch.isfinite(values).all()):
                raise AdapterError(f"module {module!r}: lora_{factor} does not fit into {values.dtype}")
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values.detach().cpu().contiguous()
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config_for(config, updates), indent=2, sort_keys=True, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _pair(module: str, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """B and A of one module."""
    if len(factors) < 2:
        raise AdapterError(f"module {module!r} has lora_{next(iter(factors))} but not the other factor")
    B, A = factors["B"], factors["A"]
    if B.shape[1] != A.shape[0]:
        shapes = f"lora_B {tuple(B.shape)} and lora_A {tuple(A.shape)}"
        raise AdapterError(f"module {module!r}: {shapes} cannot be multiplied")
    return B, A


def _read_factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise AdapterError(f"{PICKLE} is a pickle and is never opened; save the adapter as {WEIGHTS}")
    path = regular_file(folder, WEIGHTS)
    modules: dict[str, dict[str, Tensor]] = {}
    try:
        # safe_open refuses a header whose sizes do not cover the file exactly, before anything is allocated
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in sorted(file.keys()):
                module, factor = _check_header(key, file.get_slice(key))
                if factor in modules.setdefault(module, {}):
                    raise AdapterError(f"module {module!r} has lora_{factor} twice")
                modules[module][factor] = _finite(key, file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{WEIGHTS} is truncated or not a safetensors file ({error})") from error
    if not modules:
        raise AdapterError(f"{WEIGHTS} holds no LoRA factors")
    return modules


def _check_header(key: str, header: Any) -> tuple[str, str]:
    """Module and factor that a tensor's name, shape and dtype (from the file's header) stand for."""
    shape, dtype = tuple(header.get_shape()), header.get_dtype()
    match = KEY.fullmatch(key)
    if "lora_embedding_" in key:
        raise AdapterError(f"tensor {key!r}: LoRA of an embedding is not supported")
    if match is None or not key.isprintable():
        raise AdapterError(f"tensor {key!r} in {WEIGHTS} is not a LoRA factor of a linear module")
    if len(shape) != 2:
        kind = "LoRA of a convolution" if len(shape) in (3, 4, 5) else "this"
        raise AdapterError(f"tensor {key!r} has shape {shape}: {kind} is not supported, only matrices")
    if 0 in shape:
        raise AdapterError(f"tensor {key!r} is empty, shape {shape}")
    if dtype not in DTYPES:
        raise AdapterError(f"tensor {key!r} has dtype {dtype}, supported are {', '.join(DTYPES)}")
    return match["module"], match["factor"]


def _finite(key: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"tensor {key!r} has NaN or infinite entries")
    return values
