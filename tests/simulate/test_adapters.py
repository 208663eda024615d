"""Planted adapter folders: what is in them is what was asked for, and everything that reads adapters reads them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from clairlib.adapters import open_adapters
from clairlib.alignment.align import align
from clairlib.cli.synth import Dtype, Kind, Model
from clairlib.core.files import AdapterError
from clairlib.simulate import ATTACKS, Plan, synthesise
from clairlib.simulate import adapters as synthesis
from clairlib.simulate.adapters import KINDS, MODELS, module_shapes, shared_part
from clairlib.simulate.attacks import SCALED_BY
from helpers.adapter_clients import clair, snapshot, tiny_llama

SHAPE = (72, 48)
O_PROJ = "model.layers.0.self_attn.o_proj"
EXACT = Plan(clients=6, rank=6, shared_rank=2, contaminated=2, noise=0.0, dtype="float64")


def plant(folder: Path, plan: Plan, **what: object) -> dict[str, torch.Tensor]:
    """Client -> dense update of the first module, double."""
    synthesise(folder, plan, **{"shape": SHAPE} | what)
    adapters = open_adapters([folder / "clients"])
    updates = next(iter(adapters.load().values()))
    dense = [update.scale * update.B.double() @ update.A.double() for update in updates]
    return dict(zip(adapters.names, dense, strict=True))


def test_model_shapes_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=8, num_hidden_layers=1)
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, **sizes)
    qwen = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, **sizes
    )
    for name, kind, config in (
        ("llama-2-7b", LlamaForCausalLM, llama),
        ("qwen2.5-0.5b", Qwen2ForCausalLM, qwen),
    ):
        with torch.device("meta"):
            model = kind(config)
        real = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj")}
        assert module_shapes(name, None, None, 1) == real
    assert len(module_shapes("llama-2-7b", None, None, None)) == 224
    assert len(module_shapes("qwen2.5-0.5b", None, ["o_proj"], None)) == 24


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_exact_and_peft_loads_the_folders(tmp_path: Path, kind: str, dtype: str) -> None:
    plan = Plan(clients=4, rank=5, shared_rank=2, kind=kind, contaminated=1, dtype=dtype)
    modules = {"model": None, "shape": (32, 32), "modules": ["q_proj", "o_proj"], "layers": 2}
    truth = synthesise(tmp_path / "out", plan, **modules)
    (bad,) = truth["contaminated"]
    for name in plan.names():
        folder = tmp_path / "out/clients" / name
        tensors = load_file(folder / "adapter_model.safetensors")
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), folder)
        for module in truth["modules"]:
            key = f"base_model.model.{module}.lora_%s.weight"
            B, A = tensors[key % "B"], tensors[key % "A"]
            assert B.dtype == A.dtype == getattr(torch, dtype)
            expected = 0 if name == bad and kind == "free_rider" else 5
            assert int(torch.linalg.matrix_rank(B.double() @ A.double())) == expected
            layer = loaded.get_submodule(f"base_model.model.{module}")
            assert layer.scaling["default"] == 1.0
            assert torch.equal(layer.lora_B["default"].weight.data, B.to(layer.weight.dtype))


def test_without_noise_benign_clients_differ_inside_the_planted_subspace_only(tmp_path: Path) -> None:
    updates = plant(tmp_path / "out", EXACT)
    truth = json.loads((tmp_path / "out/truth.json").read_text())
    shared = shared_part(EXACT, O_PROJ, SHAPE)
    off = torch.eye(SHAPE[0]) - shared.basis @ shared.basis.T
    M = shared.common_part.dense()
    assert float(M.norm()) == pytest.approx(1.0)
    for name in truth["benign"]:
        own = updates[name] - M
        assert float((off @ own).norm()) < 1e-12
        # r rows of unit expected squared norm, each a mean of 48 squares of uniform numbers: standard deviation .14
        assert float(own.square().sum()) == pytest.approx(2.0, abs=0.7)
    for name in truth["contaminated"]:
        assert float((off @ (updates[name] - M)).norm()) > 1.0


def test_noise_has_the_energy_asked_for(tmp_path: Path) -> None:
    quiet, plan = (replace(EXACT, noise=noise, contaminated=0, rank=16, clients=8) for noise in (0.0, 3.0))
    clean, noisy = plant(tmp_path / "clean", quiet), plant(tmp_path / "noisy", plan)
    energies = torch.stack([(noisy[name] - clean[name]).square().sum() for name in plan.names()])
    # 16 terms of relative deviation about .2 a client, 8 clients: the mean has 2 %
    assert float(energies.mean()) == pytest.approx(9.0, rel=0.08)


def test_kinds_act_on_the_honest_update(tmp_path: Path) -> None:
    plan = replace(EXACT, noise=0.5, distance=0.7)
    honest = plant(tmp_path / "honest", replace(plan, contaminated=0))
    shared = shared_part(plan, O_PROJ, SHAPE)
    first, second = sorted(plan.bad())

    def sent(kind: str, **more: object) -> dict[str, torch.Tensor]:
        folder = tmp_path / f"{kind}{len(more)}"
        updates = plant(folder, replace(plan, kind=kind, **more))
        for name in set(plan.names()) - plan.bad():
            assert torch.equal(updates[name], honest[name])
        return {name: updates[name] for name in (first, second)}

    for kind, factor in (("sign_flip", -1.0), ("scaled", SCALED_BY), ("free_rider", 0.0)):
        for name, update in sent(kind).items():
            assert torch.allclose(update, factor * honest[name], rtol=1e-12, atol=1e-13)
    for in_common in (True, False):
        steps = {name: update - honest[name] for name, update in sent("stealth", **{"in_common": in_common}).items()}
        for step in steps.values():
            assert float(step.norm()) == pytest.approx(0.7) and int(torch.linalg.matrix_rank(step, rtol=1e-9)) == 1
            assert float((shared.basis.T @ step).norm()) < 1e-12
        assert torch.allclose(steps[first], steps[second], atol=1e-12) == in_common
        shutil.rmtree(tmp_path / "stealth1")
    for kind, directions in (("coalition", 2), ("unstructured", 2 * (2 + 1))):
        # without noise, two clients that share a frame differ in U A_k alone, two of their own frames in all they have
        clean = plant(tmp_path / f"clean {kind}", replace(EXACT, kind=kind))
        assert int(torch.linalg.matrix_rank(clean[first] - clean[second], rtol=1e-9)) == directions


def test_the_seed_decides_and_a_client_more_moves_nobody(tmp_path: Path) -> None:
    plan = replace(EXACT, contaminated=0, noise=1.0, dtype="bfloat16")
    one = plant(tmp_path / "one", plan)
    plant(tmp_path / "two", plan)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    more = plant(tmp_path / "more", replace(plan, clients=7), layers=2)
    assert all(torch.equal(more[name], update) for name, update in one.items())
    other = plant(tmp_path / "other", replace(plan, seed=1))
    assert not any(torch.equal(other[name], update) for name, update in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_clair_finds_the_planted_clients(tmp_path: Path, kind: str) -> None:
    plan = Plan(clients=12, rank=4, shared_rank=2, kind=kind, contaminated=3, noise=0.3)
    truth = synthesise(tmp_path / "in", plan, shape=(48, 32))
    result = align([tmp_path / "in/clients"], tmp_path / "out").result
    assert result.contaminated == truth["contaminated"] and result.modules[O_PROJ].rank == 2


@pytest.mark.parametrize(
    ("what", "culprit"),
    [
        ({"clients": 2}, "at least 3 clients"),
        ({"contaminated": 16}, "0 to 15"),
        ({"kind": "dense"}, "'dense'"),
        ({"dtype": "int8"}, "'int8'"),
        ({"shared_rank": 16}, "1 to 15"),
        ({"rank": 49}, "48"),
        ({"noise": float("nan")}, "finite"),
        ({"shape": None}, "llama-2-7b"),
        ({"model": "llama-2-7b"}, "or a shape"),
        ({"model": "gpt", "shape": None}, "'gpt'"),
        ({"model": "qwen2.5-0.5b", "shape": None, "layers": 25}, "24 layers"),
        ({"modules": ["lm_head"]}, "'lm_head'"),
        ({"layers": 0}, "at least one layer"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(tmp_path: Path, what: dict, culprit: str) -> None:
    planned = {key: what.pop(key) for key in list(what) if key in Plan.__dataclass_fields__}
    with pytest.raises(AdapterError, match=culprit) as refused:
        synthesise(tmp_path / "out", Plan(**planned), **{"shape": SHAPE} | what)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr(synthesis.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(AdapterError, match=r"5\.1 GB are needed .* 5\.0 GB are free"):
        synthesise(tmp_path / "out", Plan(clients=64), model="llama-2-7b")
    assert not list(tmp_path.iterdir())


def test_command_writes_what_it_says_and_offers_every_choice(tmp_path: Path) -> None:
    assert ([*Kind], [*Dtype], [*Model]) == ([*KINDS], [*synthesis.DTYPES], [*MODELS])
    assert set(KINDS) <= set(ATTACKS)
    options = "--shape 24 20 --clients 4 --rank 3 --shared-rank 1 --contaminated 1 --kind stealth --distance 2"
    result = clair("synth", tmp_path / "out", *options.split(), "--modules", "q_proj,o_proj")
    assert result.exit_code == 0 and result.stderr == ""
    truth = json.loads((tmp_path / "out/truth.json").read_text())
    assert truth["plan"] | {"clients": 4, "rank": 3, "kind": "stealth", "distance": 2.0} == truth["plan"]
    assert list(truth["modules"].values()) == [[24, 20]] * 2
    assert truth["bytes"] == 4 * 2 * 3 * (24 + 20) * 2
    assert "4 adapters of 2 modules" in result.stdout and truth["contaminated"][0] in result.stdout
    result = clair("synth", tmp_path / "out", "--shape", "16", "16")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "exists" in result.stderr
