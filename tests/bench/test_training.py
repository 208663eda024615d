"""The benchmarks: the same result on both sides, and what a row says. Not how fast: that is for the tables."""

import csv
import json
import math
import sys
import time

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clairlib.bench import cases as bench_cases
from clairlib.bench import convex as bench
from clairlib.bench import lower_bound as floor
from clairlib.bench import training as bench_training
from clairlib.bench.cases import EXPERIMENT, LARGE, SMALL, Case
from helpers.adapter_clients import clair
from helpers.sequential import tiny_llama, tokens_of


def test_rows_reach_the_same_objective():
    pytest.importorskip("cvxpy")
    rows = bench.convex(instances=3, repeats=1, generator=torch.Generator().manual_seed(0))
    assert [row["p"] for row in rows] == [30, 20, 12] and [row["nu"] > 0 for row in rows] == [
        False,
        True,
        False,
    ]
    for row in rows:
        assert row["ours_error"] <= bench.SAME_OBJECTIVE and row["scs_error"] <= bench.SAME_OBJECTIVE
        assert row["speed"] == pytest.approx(row["cvxpy_seconds"] / row["ours_seconds"])
    assert bench.speed_ratio(rows) == sorted(row["speed"] for row in rows)[1]


def test_missing_cvxpy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"clairlib\[test\]"):
        bench.convex(instances=1, generator=torch.Generator())


@pytest.mark.parametrize("targets", [EXPERIMENT, "last", "output", "linear"])
def test_both_sides_of_the_training_benchmark_train_the_same(targets):
    case = Case(SMALL, targets, clients=2, tokens=128, steps=3)
    row = bench_training.measure(case, repeats=1)
    assert row.items() >= {"base": SMALL, "targets": targets, "clients": 2, "tokens": 128, "steps": 3}.items()
    assert set(bench_training.SHOWN) <= row.keys() and row["difference"] <= bench_training.AGREE
    assert row["labels"] == 126 if targets != EXPERIMENT else 0 < row["labels"] < 126
    for side in ("sequential", "batched"):
        assert row[f"{side}_rate"] == pytest.approx(6 / row[f"{side}_seconds"])
        assert row[f"{side}_to_floor"] == pytest.approx(row[f"{side}_seconds"] / row["floor_seconds"])
        assert row[f"{side}_mb"] is None or 0 <= row[f"{side}_mb"] < 1000
    assert row["speed"] == pytest.approx(row["batched_rate"] / row["sequential_rate"])
    assert row["floor_gflops"] == pytest.approx(row["floor_flops"] / row["floor_seconds"] / 1e9)


def test_a_side_that_trains_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_training, "initial_factor", lambda A, draws: torch.ones_like(A))
    with pytest.raises(RuntimeError, match="losses differ by"):
        bench_training.measure(Case(SMALL, "output", clients=1, tokens=64, steps=5), repeats=1)


def test_peak_memory_counts_what_a_run_holds():
    def run():
        held = torch.ones(25_000_000)  # 100 MB
        return held[:1].clone()

    _, _, peak = bench_training.watched(run, "cpu")
    if peak is None:
        pytest.skip("no record of the peak on this system")
    assert 90e6 < peak < 130e6
    assert bench_training.watched(lambda: torch.ones(1), "cpu")[2] < 30e6  # the record starts anew


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "k_proj", "v_proj"], ["layers.2.self_attn.o_proj"], ["layers.1.mlp.up_proj", "down_proj"], ["_proj"]],
)
def test_needed_products_are_those_of_one_step_of_peft(targets):
    """One step, every token labelled: torch's own count of what a forward and backward pass multiplies."""
    model = tiny_llama(torch.float32, attn_implementation="eager")
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(targets))]
    work = floor.Work(clients=1, sequences=1, length=12, labels=12, rank=3, steps=1)
    count = floor.flops(floor.needed_products(model, names, work))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=names))
    (example,) = tokens_of(1, shortest=12, longest=12)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=example["input_ids"][None]).logits.sum().backward()
    assert counter.get_total_flops() == count


def test_needed_products_grow_with_clients_and_steps_but_for_the_frozen_part():
    model = tiny_llama(torch.float32)
    names = [name for name, _ in model.named_modules() if name.endswith("layers.2.mlp.down_proj")]

    def count(**changes):
        sizes = {"clients": 1, "sequences": 2, "length": 8, "labels": 5, "rank": 3, "steps": 1}
        return floor.flops(floor.needed_products(model, names, floor.Work(**sizes | changes)))

    assert count(clients=6) == pytest.approx(6 * count())
    step = count(steps=2) - count()
    assert count(steps=5) == pytest.approx(count() + 4 * step) and 0 < step < count() / 5
    p, q, V = 16, 24, 40  # the last down_proj and the head, at the labels
    assert step == 2 * 5 * (p * q + 2 * p * V + 3 * (p + q) + 3 * p + 3 * (p + q))


def test_time_of_the_needed_products_adds_up(monkeypatch):
    monkeypatch.setattr(floor, "seconds_of", lambda shape, device, bfloat16: math.prod(shape) / (1e6 + 3e6 * bfloat16))
    products = [((1, 10, 10, 10), 3.0), ((2, 5, 5, 4), 0.5)]
    assert floor.seconds(products, "cpu") == pytest.approx(3.1e-3)
    assert floor.seconds(products, "cpu", bfloat16=True) == pytest.approx(3.1e-3 / 4)


def test_processor_time_is_not_the_clocks():
    began, clock = floor.now("cpu"), time.perf_counter()
    time.sleep(0.2)
    assert floor.now("cpu") - began < 0.1 < time.perf_counter() - clock


def test_cases_of_the_tables():
    full = bench_cases.cases(full=True)
    assert len(full) == len(set(full)) == 4 + 2 * 3 * 3 * 4
    assert {(c.clients, c.tokens) for c in full if c.targets == "last"} == {
        (K, n) for K in (1, 4, 16, 64) for n in (32, 128, 2048)
    }
    asked = bench_cases.cases([3], [64])
    assert [(c.base, c.targets) for c in asked] == [
        (SMALL, EXPERIMENT), (SMALL, "last"), (SMALL, "output"), (LARGE, "last"), (LARGE, "output"),
    ]  # fmt: skip
    assert {c.clients for c in asked} == {3} and [c.tokens for c in asked] == [2048, 64, 64, 64, 64]
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        bench_cases.cases(tokens=[100])


def test_training_table_is_printed_and_written(tmp_path, monkeypatch):
    chosen = [Case(SMALL, "output", 1, 32, 2), Case(SMALL, "last", 2, 32, 2)]
    monkeypatch.setattr(bench_cases, "cases", lambda clients, tokens, full: chosen if clients == [1, 2] else [])
    result = clair("bench", "training", "--clients", 1, "--clients", 2, "--repeats", 1, "--output", tmp_path / "table")
    assert result.exit_code == 0 and "hidden 256, 4 layers" in result.stdout, result.output
    record = json.loads((tmp_path / "table.json").read_text())
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["targets"] for row in rows] == [row["targets"] for row in record["rows"]] == ["output", "last"]
    assert float(rows[0]["speed"]) == record["rows"][0]["speed"] and "versions" in record["provenance"]
    assert f"{record['rows'][0]['speed']:.3g}" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.json"]


def test_training_benchmark_refuses_in_one_line():
    result = clair("bench", "training", "--tokens", 100)
    assert result.exit_code == 2 and "got 100" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_benchmark_on_cuda():
    row = bench_training.measure(Case(SMALL, "output", clients=2, tokens=64, steps=2), repeats=1, device="cuda")
    assert row["batched_mb"] > 0 and row["difference"] <= bench_training.AGREE
