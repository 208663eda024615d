"""What a client's adapter_config.json says: scaling, ranks, and whether it is plain LoRA at all.

The file comes from a client that may be hostile: it is JSON of bounded size, its patterns are matched within
a time limit, and no path in it is followed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import regex

from clairlib.factors import LowRank
from clairlib.folders import AdapterError, regular_file

CONFIG = "adapter_config.json"
LARGEST_CONFIG = 2**20  # bytes; PEFT writes about one thousand
MATCH_SECONDS = 0.5  # a pattern of a hostile config may need exponential time

# Options under which the change of the weight is not scale * B @ A of the base model's own weight.
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "Monteclora",
    "megatron_config": "Megatron",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base weight


def read_config(folder: Path) -> dict[str, Any]:
    """The checked adapter_config.json of an adapter folder.

    Raises
    ------
    AdapterError
        The file is missing or not a JSON object, an option has a wrong type or is not supported.
    """
    path = regular_file(folder, CONFIG)
    if path.stat().st_size > LARGEST_CONFIG:
        raise AdapterError(f"{CONFIG} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} is not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG} must hold a JSON object, got {type(config).__name__}")
    _check_supported(config)
    _check_types(config)
    return config


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """Scaling of B @ A in a module with factors of this rank: alpha / rho, or alpha / sqrt(rho) with rsLoRA.

    Raises
    ------
    AdapterError
        The configuration states another rank for the module.
    """
    stated = _pattern_value(config["rank_pattern"], module, config["r"])
    if stated != rank:
        raise AdapterError(f"module {module!r} has factors of rank {rank}, but {CONFIG} says {stated}")
    alpha = _pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_for(config: dict[str, Any], updates: dict[str, LowRank]) -> dict[str, Any]:
    """``config`` with the ranks and scales of ``updates`` (by module), everything else kept.

    Each module gets its own rank and alpha = scale * rho; the most frequent pair becomes ``r`` and
    ``lora_alpha``, the others go into rank_pattern and alpha_pattern.
    """
    pairs = {module: (update.rank, _tidy(update.scale * update.rank)) for module, update in updates.items()}
    rank, alpha = Counter(pairs.values()).most_common(1)[0][0]
    key = {module: f"^{re.escape(module)}" for module in pairs}  # PEFT would match every name that ends so
    return config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key[module]: own for module, (own, _) in pairs.items() if own != rank},
        "alpha_pattern": {key[module]: own for module, (_, own) in pairs.items() if own != alpha},
        "use_rslora": False,
        "init_lora_weights": True,  # others cost time at loading, or refuse the new rank
    }


def _tidy(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _check_supported(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for option, name in REFUSED.items():
        if config.get(option):
            raise AdapterError(f"{name} ({option} in {CONFIG}) is not supported, only plain LoRA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias {config['bias']!r} is not supported, only 'none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(f"init_lora_weights {start!r} changes the base model; convert it to plain LoRA")


def _check_types(config: dict[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {} if config.get(key) is None else config[key]
        if not isinstance(config[key], dict):
            raise AdapterError(f"{key} in {CONFIG} must be an object, got {config[key]!r}")
    for key, value in [("r", config.get("r")), *config["rank_pattern"].items()]:
        if type(value) is not int or value < 1:
            raise AdapterError(f"rank {key!r} in {CONFIG} must be a positive integer, got {value!r}")
    for key, value in [("lora_alpha", config.get("lora_alpha")), *config["alpha_pattern"].items()]:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise AdapterError(f"alpha {key!r} in {CONFIG} must be a finite number, got {value!r}")
    if not isinstance(config.get("use_rslora", False), bool):
        raise AdapterError(f"use_rslora in {CONFIG} must be true or false, got {config['use_rslora']!r}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{key} in {CONFIG} must be a string or null, got {config[key]!r}")


def _pattern_value(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Value of the first key that matches the end of the module's name, as in PEFT's ``get_pattern_key``."""
    for key, value in pattern.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", module, timeout=MATCH_SECONDS):
                return value
        except (regex.error, TimeoutError, RecursionError) as error:
            reason = "it takes too long" if isinstance(error, TimeoutError) else error
            raise AdapterError(f"pattern {key!r} in {CONFIG} cannot be matched: {reason}") from error
    return pattern.get(module, default)
