"""Real PEFT adapters on a tiny Llama with a planted shared subspace, for tests of adapters and command."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from clairlib.cli import app

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RHO, RANK = 4, 2
TARGETS = ["o_proj", "down_proj"]
BENIGN = ["ada", "bob", "cleo", "dan", "eve", "finn", "gus", "hal"]
BAD = ["bad_1", "bad_2"]
O_PROJ = "model.layers.1.self_attn.o_proj"
KEY = f"base_model.model.{O_PROJ}.lora_%s.weight"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=48,
    )
    return LlamaForCausalLM(config)


def lora_layers(model: peft.PeftModel) -> dict[str, peft.tuners.lora.LoraLayer]:
    """Module name as in the adapter file -> PEFT's layer."""
    prefix = "base_model.model."
    layers = model.named_modules()
    return {n.removeprefix(prefix): m for n, m in layers if isinstance(m, peft.tuners.lora.LoraLayer)}


def plant(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write one adapter folder a client: U A_k + common part + small noise; contaminated: unstructured."""
    config = peft.LoraConfig(r=RHO, lora_alpha=2 * RHO, target_modules=TARGETS)
    model = peft.get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = {}
    for name, layer in lora_layers(model).items():
        p, q = layer.out_features, layer.in_features
        shared[name] = torch.linalg.qr(normal(p, RANK))[0], normal(p, 1) / p**0.5, normal(1, q) / q**0.5
    for client in BENIGN + BAD:
        for name, layer in lora_layers(model).items():
            U, c, d = shared[name]
            p, q = U.shape[0], d.shape[1]
            B = torch.cat([U, c, torch.zeros(p, 1)], dim=1) + 0.02 * normal(p, RHO) / p**0.5
            A = torch.cat([normal(RANK, q) / q**0.5, d, normal(1, q) / q**0.5])
            if client in BAD:
                B, A = torch.linalg.qr(normal(p, RHO))[0] * 0.9, normal(RHO, q) / q**0.5
            layer.lora_B["default"].weight.data = (B / 2).to(dtype)  # scale is 2
            layer.lora_A["default"].weight.data = A.to(dtype)
        model.save_pretrained(folder / client)


def clair(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> content, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(work: Path, *culprits: str, arguments: tuple = ("clients", "--output", "out")) -> None:
    """The command ends with code 2 and one line naming the culprits, and the folder is as it was."""
    before, here = snapshot(work), Path.cwd()
    os.chdir(work)
    try:
        result = clair("align", *arguments)
    finally:
        os.chdir(here)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
    for culprit in culprits:
        assert culprit in result.stderr
    assert snapshot(work) == before


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def put(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda old: old.update(tensors)


def scaled(size: float, dtype: torch.dtype = torch.float64) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: size * own.to(dtype) for key, own in tensors.items()})


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])
