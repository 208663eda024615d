"""Reading and writing of adapter_config.json: scaling, ranks, and whether the adapter is plain LoRA.

The file comes from a client that may be hostile. It must be JSON of bounded size, its patterns are matched within a
time limit, and no path in it is followed. Only known and checked options are written again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import regex

from clairlib.adapters.tensors import Factors
from clairlib.core.files import AdapterError, regular_file
from clairlib.linalg.low_rank import LowRank

CONFIG = "adapter_config.json"
LARGEST_CONFIG = 2**20  # bytes; PEFT writes about one thousand
MOST_PATTERNS, LONGEST_PATTERN = 1024, 1024  # most patterns in a table; most characters in a pattern
PATTERN_SECONDS = 2.0  # for all patterns of an adapter together: a hostile pattern may need exponential time

# READ: options that scale the factors, and KEPT, those that are written again. Others must be off or in INERT.
KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "lora_dropout")
READ = {
    *KEPT, "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
}  # fmt: skip
# INERT: options that say where LoRA is put (so do the tensors' names), how it was trained or saved, or adjust a refused
# option; none of them has an effect on the update.
INERT = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "inference_mode",
    "auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
STARTS = ("gaussian", "eva", "orthogonal", "mica")  # initialisations that do not change the base model's weight
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # those of PEFT


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked contents of adapter_config.json in an adapter folder.

    Raises
    ------
    AdapterError
        The file is missing or not a JSON object, or an option has a wrong type or is not supported.
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


def scales_of(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, float]:
    """Return the scale of B @ A by module, for factors of these ranks: alpha / rho, or alpha / sqrt(rho) with rsLoRA.

    Raises
    ------
    AdapterError
        The configuration states another rank for a module, or its patterns cannot be matched in time.
    """
    deadline = time.monotonic() + PATTERN_SECONDS
    stated = _pattern_values(config["rank_pattern"], ranks, config["r"], deadline)
    alphas = _pattern_values(config["alpha_pattern"], ranks, config["lora_alpha"], deadline)
    for module, rank in ranks.items():
        if stated[module] != rank:
            raise AdapterError(f"module {module!r} has factors of rank {rank}, but {CONFIG} says {stated[module]}")
    rslora = config.get("use_rslora")
    return {module: alphas[module] / (math.sqrt(rank) if rslora else rank) for module, rank in ranks.items()}


def config_for(config: dict[str, Any], updates: Mapping[str, LowRank | Factors]) -> dict[str, Any]:
    """Return a plain LoRA configuration with the ranks and scales of ``updates`` and the base model of ``config``.

    Each module gets its own rank and alpha = scale * rho. The most frequent pair becomes ``r`` and ``lora_alpha``; the
    others go into rank_pattern and alpha_pattern. Of a client's options only the checked ones in KEPT are kept.
    """
    pairs = {module: (update.rank, _tidy(update.scale * update.rank)) for module, update in updates.items()}
    rank, alpha = Counter(pairs.values()).most_common(1)[0][0]
    key = {module: f"^{re.escape(module)}" for module in pairs}  # without ^, PEFT would match every name with this end
    return {option: config[option] for option in KEPT if config.get(option)} | {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": list(updates),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key[module]: own for module, (own, _) in pairs.items() if own != rank},
        "alpha_pattern": {key[module]: own for module, (_, own) in pairs.items() if own != alpha},
    }


def _tidy(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _check_supported(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for option, value in config.items():
        if value and option not in READ | INERT:
            raise AdapterError(f"option {option[:99]!r} in {CONFIG} is not supported, only plain LoRA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias {config['bias']!r} is not supported, only 'none'")
    start = config.get("init_lora_weights")
    if start not in (None, True, False) and str(start).lower() not in STARTS:
        raise AdapterError(f"init_lora_weights {start!r} may change the base model; convert it to plain LoRA")
    if config.get("task_type") not in (None, *TASKS):
        raise AdapterError(f"task_type {config['task_type']!r} in {CONFIG} is not known to PEFT")


def _check_types(config: dict[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {} if config.get(key) is None else config[key]
        if not isinstance(config[key], dict):
            raise AdapterError(f"{key} in {CONFIG} must be an object, got {config[key]!r}")
        if len(config[key]) > MOST_PATTERNS or any(len(pattern) > LONGEST_PATTERN for pattern in config[key]):
            most = f"at most {MOST_PATTERNS} patterns of {LONGEST_PATTERN} characters"
            raise AdapterError(f"{key} in {CONFIG} must have {most}")
    for key, value in [("r", config.get("r")), *config["rank_pattern"].items()]:
        if type(value) is not int or value < 1:
            raise AdapterError(f"rank {key!r} in {CONFIG} must be a positive integer, got {value!r}")
    for key, value in [("lora_alpha", config.get("lora_alpha")), *config["alpha_pattern"].items()]:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise AdapterError(f"alpha {key!r} in {CONFIG} must be a finite number, got {value!r}")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key, False), bool):
            raise AdapterError(f"{key} in {CONFIG} must be true or false, got {config[key]!r}")
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise AdapterError(f"lora_dropout in {CONFIG} must lie in [0, 1], got {dropout!r}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{key} in {CONFIG} must be a string or null, got {config[key]!r}")


def _pattern_values(table: dict[str, Any], modules: Iterable[str], default: Any, deadline: float) -> dict[str, Any]:
    """Return by module the value of the first key that matches the end of its name, as PEFT's ``get_pattern_key``."""
    values = {module: table.get(module, default) for module in modules}
    left = list(values)
    for key, value in table.items():
        try:
            pattern = regex.compile(rf"(.*\.)?({key})$")
            found = {module for module in left if pattern.match(module, timeout=max(deadline - time.monotonic(), 0))}
        except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
            reason = "it takes too long" if isinstance(error, TimeoutError) else str(error) or "out of memory"
            raise AdapterError(f"pattern {key[:99]!r} in {CONFIG} cannot be matched: {reason}") from error
        values |= dict.fromkeys(found, value)
        left = [module for module in left if module not in found]
    return values
