"""The alignment benchmark and the study of scale: what a row says. Not how fast: that is for the tables."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig

from clairlib.adapters import open_adapters
from clairlib.adapters.config import CONFIG
from clairlib.bench import alignment as bench_align
from clairlib.bench import lower_bound as floor
from clairlib.reproduce.sweep import sweep
from clairlib.simulate import Plan, synthesise
from helpers.adapter_clients import clair
from studies.llm_scale import plots as scale_plots
from studies.llm_scale import study as scale_study

PLAN = Plan(clients=8, rank=6, shared_rank=2, contaminated=1, dtype="float32")
SHAPE = (48, 32)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "planted"
    synthesise(folder, PLAN, shape=SHAPE, layers=2, modules=["o_proj", "q_proj"])
    return folder / "clients"


def test_needed_products_are_one_triangle_of_both_grams(clients):
    N = 8 * 6
    count = floor.flops(bench_align.gram_products(open_adapters([clients])))
    assert count == pytest.approx(4 * (48 + 32) * N**2)


def test_only_files_of_bfloat16_have_a_floor_of_such_products(clients):
    parts, bfloat16_gram = bench_align.floor_seconds(open_adapters([clients]), 1)
    assert min(parts["read_seconds"], parts["gram_seconds"]) > 0 and bfloat16_gram is None


def test_whole_files_are_read(clients):
    adapters = open_adapters([clients])
    size = bench_align.read_files([file.path for file in adapters.files])
    assert size == sum(file.path.stat().st_size for file in adapters.files)
    assert adapters.bytes < size < adapters.bytes + 8 * 2000  # headers


def test_dense_route_is_scaled_by_counts(clients, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_align, "dense_parts", lambda updates, device: (0.5, 0.25))
    total, factor = bench_align.dense_route(open_adapters([clients]))
    assert total == pytest.approx(4 * (8 / 2 * 0.5 + 0.25)) and factor == pytest.approx(total / 0.75)
    synthesise(tmp_path / "planted", PLAN, model="qwen2.5-0.5b", layers=1, modules=["k_proj", "down_proj"])
    total, _ = bench_align.dense_route(open_adapters([tmp_path / "planted/clients"]))  # k: 128 x 896, down: 896 x 4864
    formed, decomposed = 4 * 0.5 * (1 + 7**2 * 4864 / 896), 0.25 * (1 + 7**3)
    assert total == pytest.approx(formed + decomposed)


def test_memory_is_that_of_the_work_and_of_its_children():
    held = torch.ones(50_000_000)  # what this process holds does not count
    (_, idle), (count, peak) = (bench_align.apart(eval, f"len(b'1' * {size})") for size in (1, 10**8))
    assert len(held) and count == 10**8 and 90e6 < peak - idle < 130e6
    alone, three = (bench_align.watched(eval, ["1"], children)[1] for children in (0, 3))
    largest = bench_align.in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    assert three - alone == 3 * largest > 3 * 90e6


def test_a_row_of_the_benchmark_adds_up(tmp_path):
    plan = replace(PLAN, dtype="bfloat16")
    table = bench_align.measure_planted(plan, scratch=tmp_path, jobs=(1,), shape=SHAPE, layers=2)
    row = table.iloc[0]
    assert (row.device, row.jobs, row.exact) == ("cpu", 1, True) and list(tmp_path.iterdir()) == []
    assert row.copy_seconds == 0 < min(row.read_seconds, row.gram_seconds)
    assert row.floor_seconds == pytest.approx(row.read_seconds + row.copy_seconds + row.gram_seconds)
    assert row.to_floor == pytest.approx(row.align_seconds / row.floor_seconds)
    assert row.to_bfloat16_floor == pytest.approx(row.align_seconds / row.bfloat16_floor_seconds)
    assert row.bfloat16_floor_seconds > row.read_seconds
    assert row.dense_to_align == pytest.approx(row.dense_seconds / row.align_seconds)
    assert 0 < row.search_seconds < row.align_seconds and 0.1 < row.memory_gb < 3
    assert len(scale_plots.bench(table).axes) == 1


def test_command_prints_the_table_and_writes_it(clients, tmp_path, monkeypatch):
    row = {"device": "cpu", "jobs": 2, "align_seconds": 1.25, "to_floor": 1.5, "contaminated": "client_003"}
    monkeypatch.setattr(bench_align, "measure", lambda folder, scratch, jobs: pd.DataFrame([row] * len(jobs)))
    result = clair("bench", "align", clients, "--jobs", "1,2", "--csv", tmp_path / "table.csv")
    assert result.exit_code == 0 and "to floor" in result.stdout and result.stdout.count(" 1.25 ") == 2, result.output
    assert pd.read_csv(tmp_path / "table.csv").to_dict("records") == [row, row]
    for wrong in ("0", "one", "1,,2", ""):
        assert clair("bench", "align", clients, "--jobs", wrong).exit_code == 2
    monkeypatch.undo()
    result = clair("bench", "align", tmp_path)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


def test_refined_adapters_are_the_dense_ones_and_a_wrong_scale_is_seen(tmp_path, monkeypatch):
    setting = {"ranks": [8, 16], "clients": 12, "p": 160, "q": 150, "seed": 0, "scratch": str(tmp_path)}
    rows = scale_study.exactness_cell(rslora=True, dtype="float64", **setting)["exactness"]
    assert rows and max(row["error"] for row in rows) < 1e-8
    monkeypatch.setattr(scale_study, "state_as_rslora", _state_wrongly)
    rows = scale_study.exactness_cell(rslora=True, dtype="float64", **setting)["exactness"]
    assert max(row["error"] for row in rows) > 0.1


def _state_wrongly(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_rslora": True}))


def test_stating_a_scale_as_rslora_keeps_it(tmp_path):
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {"^a": 16}, "alpha_pattern": {"^a": 16}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    scale_study.state_as_rslora(tmp_path / CONFIG)
    stated = json.loads((tmp_path / CONFIG).read_text())
    assert LoraConfig(**stated).use_rslora
    assert stated["lora_alpha"] / math.sqrt(8) == pytest.approx(1)
    assert stated["alpha_pattern"]["^a"] / math.sqrt(16) == pytest.approx(1)


def test_verdicts_and_their_summary(tmp_path):
    setting = {"clients": 12, "rank": 16, "sizes": {"shape": [256, 192], "layers": 1}}
    points = [{**scale_study.VERDICTS[0], **setting, "seed": 0}, {**scale_study.VERDICTS[-1], **setting, "seed": 0}]
    verdicts = sweep(scale_study.verdict_cell, points, shared={"scratch": str(tmp_path)})["verdicts"]
    table = scale_study.summary_of_verdicts(verdicts)
    assert list(table.kind) == ["stealth", "coalition"] and list(table.contaminated) == [2, 5]
    assert table.exact.eq(1).all() and (table.least_bad > table.most_benign).all()
    assert len(scale_study.promised(table)) == 2


def test_promised_distance_shrinks_as_the_noise_spreads():
    near, far, loud = (scale_study.promised_distance(Plan(noise=n), p) for n, p in ((1, 64), (1, 4096), (2, 64)))
    assert 0 < far < near and loud == pytest.approx(2 * near)


def test_exponents_are_those_of_a_power_law():
    counts = [16, 64, 256, 1000]
    rows = [{"along": "clients", "clients": K, "align_seconds": 3 * K**1.7, "memory_gb": K**0.5} for K in counts]
    table = pd.DataFrame(rows).assign(search_seconds=1.0)
    slopes = scale_study.exponents(table).set_index("of")
    assert slopes.exponent.to_dict() == pytest.approx({"align_seconds": 1.7, "memory_gb": 0.5})
    assert len(scale_plots.growth(table, slopes.reset_index()).axes) == 2
