"""Adapter folders: what is read equals PEFT's update, what is written loads in PEFT, outputs are whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from clairlib import CLAIR, LowRank
from clairlib.adapters import open_adapters
from clairlib.adapters.folder import read_lora, write_lora
from clairlib.alignment.align import align
from clairlib.linalg.low_rank import truncate
from clairlib.linalg.refined_factors import exact_update
from clairlib.recovery.module_fit import ModuleFit
from clairlib.recovery.refinement import Gain
from helpers.adapter_clients import BAD, BENIGN, RHO, lora_layers, plant, tiny_llama

PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.o_proj": 3, r"layers\.\d+\.mlp\.down_proj": 6},
    "alpha_pattern": {"down_proj": 5, "^model.layers.1.self_attn.o_proj": 7},
}
MODULES = {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.o_proj", "mlp.down_proj")}
REFUSED = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "clients"
    plant(folder)
    return folder


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))


def random_adapter(base: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options) -> peft.PeftModel:
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))
    for layer in lora_layers(model).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, **PATTERNS},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, **PATTERNS},
    ],
    ids=["plain", "rslora", "patterns", "rslora-patterns"],
)
def test_update_read_equals_pefts_delta_weight(tmp_path: Path, options: dict) -> None:
    model = random_adapter(tiny_llama(), tmp_path / "a", target_modules=["o_proj", "down_proj"], **options)
    _, updates = read_lora(tmp_path / "a")
    assert set(updates) == MODULES
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(updates[name].dense(), layer.get_delta_weight("default"))


def test_conv1d_update_has_output_rows(tmp_path: Path) -> None:
    model = random_adapter(
        tiny_gpt2(), tmp_path / "a", r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True
    )
    _, updates = read_lora(tmp_path / "a")
    (name, layer), *_ = lora_layers(model).items()
    assert updates[name].shape == (48, 16)
    torch.testing.assert_close(updates[name].dense(), layer.get_delta_weight("default").T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    random_adapter(tiny_llama(), tmp_path / "a", dtype, r=2, target_modules=["o_proj"])
    config, updates = read_lora(tmp_path / "a")
    write_lora(tmp_path / "b", config, updates)
    _, again = read_lora(tmp_path / "b")
    assert {u.B.dtype for u in again.values()} == {dtype}
    for name, update in updates.items():
        assert torch.equal(update.B, again[name].B) and torch.equal(update.A, again[name].A)
        assert update.scale == pytest.approx(again[name].scale, rel=1e-15)


class Nested(nn.Module):
    """One module's name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 7)})
        self.last = nn.ModuleDict({"proj": nn.Linear(7, 8)})


def test_ranks_and_scales_of_every_module_survive_writing(tmp_path: Path) -> None:
    random_adapter(Nested(), tmp_path / "a", r=2, target_modules=["proj"], use_rslora=True)
    config, updates = read_lora(tmp_path / "a")
    kinds = {"proj": (3, 0.7), "inner.proj": (1, 2.0), "last.proj": (3, 5.0)}
    for name, (rank, scale) in kinds.items():
        p, q = updates[name].shape
        updates[name] = LowRank(torch.randn(p, rank), torch.randn(rank, q), scale)
    write_lora(tmp_path / "b", config, updates)
    model = peft.PeftModel.from_pretrained(Nested(), tmp_path / "b")
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[name].dense())


def test_adapter_set_has_every_client_and_module(clients: Path) -> None:
    adapters = open_adapters([clients])
    assert adapters.names == sorted(BENIGN + BAD)
    assert set(adapters.modules) == MODULES
    assert all([u.rank for u in updates] == [RHO] * 10 for updates in adapters.load().values())
    assert open_adapters([clients / name for name in ("hal", "ada", "bob")]).names == ["hal", "ada", "bob"]


def refined_by_fit(clients: Path, **how) -> tuple[list[str], dict[str, list[torch.Tensor]]]:
    """The names of the clients, and their dense refined updates by module before truncation, of a fit in memory."""
    adapters = open_adapters([clients])
    double = {
        name: [LowRank(u.B.double(), u.A.double(), u.scale) for u in own] for name, own in adapters.load().items()
    }
    result = CLAIR(**how).fit(double, names=adapters.names)
    return adapters.names, {
        name: [exact_update(module.basis, module.common_part, u).dense() for u in double[name]]
        for name, module in result.modules.items()
    }


def test_refined_folders_load_in_peft_and_equal_the_result(clients: Path, tmp_path: Path) -> None:
    outcome = align([clients], tmp_path / "out", rank=2)
    assert [n for n, good in zip(outcome.result.names, outcome.result.benign, strict=True) if not good] == BAD
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*BENIGN, "report.json", "report.html"}
    names, by_fit = refined_by_fit(clients, rank=2)
    errors: dict[str, list[float]] = {name: [] for name in MODULES}
    for client in BENIGN:
        model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / client)
        k = names.index(client)
        for name, layer in lora_layers(model).items():
            refined = by_fit[name][k]
            errors[name].append(float((layer.get_delta_weight("default") - refined).norm() / refined.norm()))
    for module in outcome.report["modules"]:
        stated, found = module["truncation_error"], errors[module["name"]]
        assert module["refined"]
        assert max(found) == pytest.approx(stated["max"], rel=1e-3, abs=1e-6)
        assert sum(found) / len(found) == pytest.approx(stated["mean"], rel=1e-3, abs=1e-6)


def test_adapter_rank_is_written_and_smaller_ranks_lose_more(clients: Path, tmp_path: Path) -> None:
    worst = {}
    for rank in (1, 3, 6):
        outcome = align([clients], tmp_path / str(rank), adapter_rank=rank)
        config, updates = read_lora(tmp_path / str(rank) / "ada")
        assert {u.rank for u in updates.values()} == {rank} and config["r"] == rank
        own = read_lora(clients / "ada")[1]
        assert {name: u.scale for name, u in updates.items()} == {name: u.scale for name, u in own.items()}
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        worst[rank] = [module["truncation_error"]["max"] for module in outcome.report["modules"]]
    assert all(a > b >= c for a, b, c in zip(worst[1], worst[3], worst[6], strict=True))
    assert max(worst[3]) < 0.05 < min(worst[1])  # shared rank 2 and a common part of rank 1


def test_refused_module_keeps_the_clients_own_update(clients: Path, tmp_path: Path, monkeypatch) -> None:
    outcome_of = ModuleFit.outcome

    def refusing(self, members):
        outcome = outcome_of(self, members)
        return replace(outcome, gain=Gain(1.0, 2.0, 0.0, 0.0, 0.0)) if self.name == REFUSED else outcome

    monkeypatch.setattr(ModuleFit, "outcome", refusing)
    outcome = align([clients], tmp_path / "out")
    assert [m["name"] for m in outcome.report["modules"] if not m["refined"]] == [REFUSED]
    own, written = read_lora(clients / "bob")[1], read_lora(tmp_path / "out" / "bob")[1]
    same = {n for n in MODULES if torch.equal(own[n].B, written[n].B) and torch.equal(own[n].A, written[n].A)}
    assert same == {REFUSED} and own[REFUSED].scale == written[REFUSED].scale
    align([clients], tmp_path / "narrow", adapter_rank=1)
    _, narrow = read_lora(tmp_path / "narrow" / "bob")
    torch.testing.assert_close(narrow[REFUSED].dense(), truncate(own[REFUSED], 1)[0].dense())


def test_bfloat16_clients_get_bfloat16_back(tmp_path: Path) -> None:
    plant(tmp_path / "clients", torch.bfloat16)
    align([tmp_path / "clients"], tmp_path / "out")
    _, updates = read_lora(tmp_path / "out" / "cleo")
    names, by_fit = refined_by_fit(tmp_path / "clients")
    for name, update in updates.items():
        assert update.B.dtype == update.A.dtype == torch.bfloat16
        refined = by_fit[name][names.index("cleo")].float()
        written = LowRank(update.B.float(), update.A.float(), update.scale).dense()
        assert float((written - refined).norm() / refined.norm()) < 0.02


def test_clients_may_differ_in_dtype(clients: Path, tmp_path: Path) -> None:
    shutil.copytree(clients, tmp_path / "clients")
    kinds = {"ada": torch.bfloat16, "dan": torch.float64}
    for client, dtype in kinds.items():
        config, updates = read_lora(clients / client)
        shutil.rmtree(tmp_path / "clients" / client)
        cast = {name: LowRank(own.B.to(dtype), own.A.to(dtype), own.scale) for name, own in updates.items()}
        write_lora(tmp_path / "clients" / client, config, cast)
    outcome = align([tmp_path / "clients"], tmp_path / "out", adapter_rank=6)
    names, by_fit = refined_by_fit(tmp_path / "clients")
    for client, (dtype, tolerance) in {"ada": (torch.bfloat16, 0.02), "dan": (torch.float64, 1e-9)}.items():
        for name, update in read_lora(tmp_path / "out" / client)[1].items():
            assert update.B.dtype == update.A.dtype == dtype
            refined = by_fit[name][names.index(client)]
            written = LowRank(update.B.double(), update.A.double(), update.scale).dense()
            lost = max(m["truncation_error"]["max"] for m in outcome.report["modules"])
            assert float((written - refined).norm() / refined.norm()) < lost + tolerance


def test_clients_may_differ_in_rank(clients: Path, tmp_path: Path) -> None:
    shutil.copytree(clients, tmp_path / "clients")
    config, updates = read_lora(clients / "ada")
    wide = {
        name: LowRank(torch.cat([own.B, 0 * own.B[:, :2]], 1), torch.cat([own.A, own.A[:2]]), own.scale)
        for name, own in updates.items()
    }
    shutil.rmtree(tmp_path / "clients" / "ada")
    write_lora(tmp_path / "clients" / "ada", config, wide)
    align([tmp_path / "clients"], tmp_path / "out")
    ranks = {name: {u.rank for u in read_lora(tmp_path / "out" / name)[1].values()} for name in ("ada", "bob")}
    assert ranks == {"ada": {RHO + 2}, "bob": {RHO}}


def test_report_is_strict_json_in_the_agreed_shape(clients: Path, tmp_path: Path) -> None:
    align([clients], tmp_path / "out", seed=4)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=refuse)
    assert list(report) == ["clients", "modules", "remarks", "shared", "settings", "provenance"]
    keys = ["name", "contaminated", "verdict", "smallest_deviation", "found_in", "score", "p_value", "modules"]
    assert list(report["clients"][0]) == keys and report["shared"] is True
    assert set(report["clients"][0]["modules"]) == MODULES
    keys = ["name", "shape", "rank", "shared_structure", "estimated_gain", "refined", "truncation_error", "spectrum"]
    assert all(list(module) == keys for module in report["modules"])
    assert report["settings"]["seed"] == 4 and report["provenance"]["versions"]["peft"] == peft.__version__
