"""A client's configuration: what of PEFT's plain LoRA is accepted, and what of it is written again."""

import json
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch

from clairlib import LowRank
from clairlib.adapters.config import INERT, KEPT, READ, read_config
from clairlib.adapters.folder import read_lora, write_lora
from clairlib.core.files import AdapterError
from helpers.adapter_clients import CONFIG, TARGETS, lora_layers, tiny_llama

HOSTILE = {
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "antigravity"},
    "target_modules": "(a+)+$",
    "exclude_modules": ".*o_proj",
    "layers_to_transform": None,
    "layers_pattern": ["h"],
    "eva_config": {"rho": -1},
    "megatron_core": "antigravity",
    "peft_version": "nonsense\n",
    "qalora_group_size": float("nan"),
    "unknown_but_off": None,
}
INERT_VALUES = {"lora_dropout": 0.1, "revision": "v1", "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}


def edited(folder: Path, **changes: object) -> Path:
    """A config of the installed PEFT, changed."""
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj"]).save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def test_defaults_of_the_installed_peft_are_plain_lora(tmp_path: Path) -> None:
    assert read_config(edited(tmp_path))["r"] == 2
    assert READ | INERT <= {field.name for field in fields(peft.LoraConfig)}  # no option is misspelt


@pytest.mark.parametrize("option", sorted({f.name for f in fields(peft.LoraConfig)} - READ - INERT))
def test_every_other_option_of_peft_is_refused_when_on(tmp_path: Path, option: str) -> None:
    assert read_config(edited(tmp_path, **{option: None}))[option] is None
    with pytest.raises(AdapterError, match=option):
        read_config(edited(tmp_path, **{option: {"x": 1}}))


@pytest.mark.parametrize(
    "start", ["pissa", "PiSSA", "olora", "corda", "loftq", "lora_ga", "pissa_niter_4", "", ["eva"]]
)
def test_initialisation_that_may_change_the_base_is_refused(tmp_path: Path, start: object) -> None:
    with pytest.raises(AdapterError, match="init_lora_weights"):
        read_config(edited(tmp_path, init_lora_weights=start))


def test_written_config_keeps_only_what_was_checked(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE | INERT_VALUES))
    config, updates = read_lora(tmp_path / "a")
    write_lora(tmp_path / "b", config, updates)
    written = json.loads((tmp_path / "b" / CONFIG).read_text())
    sizes = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert set(written) <= {*KEPT, *sizes, "peft_type", "inference_mode", "target_modules"}
    assert written["target_modules"] == list(updates)
    assert all(written[option] == INERT_VALUES[option] for option in ("lora_dropout", "revision", "task_type"))
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(
            lora_layers(again)[name].get_delta_weight("default"), layer.get_delta_weight("default")
        )


def test_nan_is_never_written(tmp_path: Path) -> None:
    update = {"proj": LowRank(torch.ones(3, 1), torch.ones(1, 3), float("nan"))}
    with pytest.raises(ValueError):
        write_lora(tmp_path / "b", {}, update)


def test_many_patterns_of_an_honest_config_are_matched_in_time(tmp_path: Path) -> None:
    from clairlib.adapters.config import scales_of

    names = [f"model.layers.{i}.{m}" for i in range(32) for m in ("q", "k", "v", "o", "gate", "up", "down")]
    patterns = {f"^{name.replace('.', chr(92) + '.')}": 1 + i % 7 for i, name in enumerate(names)}
    config = read_config(edited(tmp_path, rank_pattern=patterns, alpha_pattern=patterns))
    assert set(scales_of(config, {name: 1 + i % 7 for i, name in enumerate(names)}).values()) == {1.0}
