"""Alignment module by module: the same result by any number of processes, passes and interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from clairlib import CLAIR
from clairlib.adapters import open_adapters
from clairlib.adapters.folder import read_lora
from clairlib.alignment import passes as alignment_passes
from clairlib.alignment.align import align
from clairlib.core.files import AdapterError
from clairlib.simulate import Plan, synthesise
from helpers.adapter_clients import clair

PLAN = Plan(clients=10, rank=14, shared_rank=2, kind="coalition", contaminated=3, noise=0.5, dtype="float32")
SHAPE = (180, 160)  # 140 directions of all clients: more than the exact cores take


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "synth"
    synthesise(folder, PLAN, shape=SHAPE, layers=5, modules=["o_proj", "down_proj"])
    return folder / "clients"


@pytest.fixture(scope="module")
def whole(clients: Path) -> Path:
    output = clients.parent / "whole"
    align([clients], output)
    return output


def digests(folder: Path) -> dict[str, str]:
    """Of every file that does not name a time."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("report")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def report_of(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    return {key: report[key] for key in ("clients", "modules")}


def test_verdict_and_adapters_are_those_of_the_fit_in_memory(clients: Path, whole: Path) -> None:
    adapters = open_adapters([clients])
    result = CLAIR().fit(adapters.load(), names=adapters.names)
    truth = json.loads((clients.parent / "truth.json").read_text())
    report = report_of(whole)
    assert [c["name"] for c in report["clients"] if c["contaminated"]] == result.contaminated == truth["contaminated"]
    assert [c["score"] for c in report["clients"]] == pytest.approx(result.scores.tolist(), abs=1e-3)
    for module in report["modules"]:
        fitted = result.modules[module["name"]]
        assert module["rank"] == fitted.rank == 2
        assert module["shared_structure"] == pytest.approx(fitted.shared_structure, abs=1e-6)
        errors = fitted.truncation_errors[result.benign]
        assert module["truncation_error"]["max"] == pytest.approx(float(errors.max()), rel=1e-6) and errors.max() < 0.3
        assert module["truncation_error"]["mean"] == pytest.approx(float(errors.mean()), rel=1e-6)
        for k, name in enumerate(adapters.names):
            if result.benign[k]:
                written, refined = read_lora(whole / name)[1][module["name"]], fitted.refined[k]
                assert written.rank == refined.rank and written.B.dtype == refined.B.dtype
                assert float((written.dense() - refined.dense()).norm()) < 1e-5 * float(refined.dense().norm())


def test_two_processes_write_the_same_bytes(clients: Path, whole: Path, tmp_path: Path) -> None:
    align([clients], tmp_path / "out", jobs=2)
    assert digests(tmp_path / "out") == digests(whole) and report_of(tmp_path / "out") == report_of(whole)


@pytest.mark.parametrize("jobs", [1, 2])
def test_wrong_first_set_costs_a_pass_and_nothing_else(clients: Path, whole: Path, tmp_path, monkeypatch, jobs) -> None:
    start, passes = CLAIR.start, []

    def without_one(*arguments):
        fits, known, benign = start(*arguments)
        benign = benign.clone()
        benign[int(benign.nonzero()[0])] = False
        return fits, known, benign

    def counted(self, benign):
        passes.append(benign)
        return read(self, benign)

    read = alignment_passes.Passes.read
    monkeypatch.setattr(CLAIR, "start", without_one)
    monkeypatch.setattr(alignment_passes.Passes, "read", counted)
    align([clients], tmp_path / "out", jobs=jobs)
    assert len(passes) == 2 and digests(tmp_path / "out") == digests(whole)


class Killed(BaseException):
    """Not an error: what the process is doing ends here."""


def interrupted(clients: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run that ends when ``after`` modules are done."""
    work, done = alignment_passes.align_module, []

    def killing(*arguments):
        if len(done) == after:
            raise Killed
        done.append(arguments[1])
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(alignment_passes, "align_module", killing)
        with pytest.raises(Killed):
            align([clients], output, resume=True)


@pytest.mark.parametrize("after", [0, 4, 9])
def test_interrupted_run_is_resumed_to_the_identical_result(clients, whole, tmp_path, monkeypatch, after) -> None:
    interrupted(clients, tmp_path / "out", monkeypatch, after)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    work, done = alignment_passes.align_module, []
    monkeypatch.setattr(alignment_passes, "align_module", lambda *a: done.append(a[1]) or work(*a))
    align([clients], tmp_path / "out", resume=True)
    assert len(done) == 10 - after
    assert digests(tmp_path / "out") == digests(whole) and report_of(tmp_path / "out") == report_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_run_is_not_silently_replaced(clients: Path, tmp_path: Path, monkeypatch) -> None:
    interrupted(clients, tmp_path / "out", monkeypatch, 2)
    result = clair("align", clients, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "--resume" in result.stderr and result.stderr.count("\n") == 1
    result = clair("align", clients, "--output", tmp_path / "out", "--resume", "--rank", "3")
    assert result.exit_code == 2 and "other clients, settings or versions" in result.stderr
    assert (tmp_path / ".out.partial").exists() and not (tmp_path / "out").exists()


def test_clients_that_changed_since_are_not_resumed(clients: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(clients, tmp_path / "clients")
    interrupted(tmp_path / "clients", tmp_path / "out", monkeypatch, 2)
    os.utime(tmp_path / "clients/client_000/adapter_model.safetensors")
    with pytest.raises(AdapterError, match="other clients"):
        align([tmp_path / "clients"], tmp_path / "out", resume=True)


def test_second_run_into_the_same_output_is_refused(clients: Path, tmp_path: Path, monkeypatch) -> None:
    iterate_verdict = alignment_passes.search_on_disk

    def meanwhile(*arguments):
        with pytest.raises(AdapterError, match="another run"):
            align([clients], tmp_path / "out", resume=True)
        return iterate_verdict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(alignment_passes, "search_on_disk", meanwhile)
        align([clients], tmp_path / "out")
    assert (tmp_path / "out/report.json").exists()


def test_dry_run_says_what_it_takes_and_writes_nothing(clients: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in clients.rglob("*.safetensors"))
    result = clair("align", clients, "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith("10 clients, 10 modules, ")
    assert f"{size / 1e9:.2f} GB to read" in result.stdout and list(tmp_path.iterdir()) == []
    assert clair("align", tmp_path, "--output", tmp_path / "out", "--dry-run").exit_code == 2
