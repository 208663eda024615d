"""The clair command: what it writes, prints and returns. Its refusals are in test_refusals.py."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.adapter_clients import BAD, BENIGN, CONFIG, WEIGHTS, clair, snapshot
from helpers.processes import HANG_SECONDS


def test_align_writes_folders_report_and_picture_and_says_the_same(work: Path) -> None:
    result = clair("align", work / "clients", "--output", work / "out")
    assert result.exit_code == 0 and result.stderr == ""
    assert {path.name for path in (work / "out").iterdir()} == {*BENIGN, "report.json", "report.html", "report.png"}
    assert (work / "out/report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((work / "out/report.json").read_text())
    assert [client["name"] for client in report["clients"] if client["contaminated"]] == BAD
    lines = result.stdout.splitlines()
    for client in report["clients"]:
        (line,) = [line for line in lines if f" {client['name']} " in line]
        assert ("contaminated" in line) == client["contaminated"] and f"{client['score']:.3g}" in line
    assert sum("8 benign, 2 contaminated; written to" in line for line in lines) == 1
    assert all(any(line.startswith(f"{name}: found in ") for line in lines) for name in BAD)
    assert sorted(path.name for path in work.iterdir()) == ["clients", "out"]


def test_options_reach_the_fit_and_the_report(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clairlib import CLAIR

    seen: list[dict] = []
    monkeypatch.setattr("clairlib.alignment.align.CLAIR", lambda **method: seen.append(method) or CLAIR(**method))
    options = {"rank": 2, "adapter_rank": 3, "solver": "convex", "seed": 5}
    arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    assert clair("align", work / "clients", "--output", work / "out", "--quiet", *arguments).exit_code == 0
    assert seen == [{"rank": 2, "solver": "convex", "side": "output", "seed": 5}]
    report = json.loads((work / "out/report.json").read_text())
    assert options.items() <= report["settings"].items()
    assert [client["name"] for client in report["clients"] if client["contaminated"]] == BAD
    assert {module["rank"] for module in report["modules"]} == {2}
    assert json.loads((work / "out/ada" / CONFIG).read_text())["r"] == 3


def test_trusted_clients_reach_the_verdict_and_the_report(work: Path) -> None:
    arguments = ("align", work / "clients", "--output", work / "out")
    assert clair(*arguments, "--trusted", "bob", "--trusted", "ada", "--quiet").exit_code == 0
    report = json.loads((work / "out/report.json").read_text())
    assert report["settings"]["trusted"] == ["ada", "bob"]
    assert [client["name"] for client in report["clients"] if client["contaminated"]] == BAD
    for wrong, what in (("nobody", "trusted client 'nobody'"), (BAD[0], "in no group of clients that agree")):
        result = clair(*arguments, "--overwrite", "--trusted", wrong)
        assert result.exit_code == 2 and what in result.stderr and len(result.stderr.splitlines()) == 1


def test_existing_output_needs_overwrite(work: Path) -> None:
    arguments = ("align", work / "clients", "--output", work / "out", "--quiet")
    assert clair(*arguments).exit_code == 0
    before = snapshot(work)
    result = clair(*arguments)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and snapshot(work) == before
    result = clair(*arguments, "--keep-contaminated", "--overwrite")
    assert result.exit_code == 0 and result.output == ""
    for client in BAD:
        copied = snapshot(work / "out" / client)
        assert copied == {file: (work / "clients" / client / file).read_bytes() for file in (CONFIG, WEIGHTS)}


def test_names_are_not_markup(work: Path) -> None:
    (work / "clients/ada").rename(work / "clients/[red]ada")
    result = clair("align", work / "clients", "--output", work / "out")
    assert result.exit_code == 0 and "[red]ada" in result.stdout
    assert (work / "out/[red]ada" / WEIGHTS).is_file()


def test_help_and_version_load_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'papermill'}"
    check = f"import sys, clairlib.cli.commands; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert clair("--help").exit_code == 0
    assert clair("--version").stdout.startswith("clair 0.")


def test_reproduce_reports_failures_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import clairlib.reproduce.run as reproduce

    calls = []

    def fake(notebooks: list[str] | None, **options: object) -> list[reproduce.NotebookRun]:
        calls.append((notebooks, options))
        if notebooks == ["unknown"]:
            raise reproduce.ReproduceError("no notebook 'unknown'")
        status = "failed" if notebooks else "ran"
        return [reproduce.NotebookRun("00", status, 1.0, tmp_path, tmp_path)]

    monkeypatch.setattr(reproduce, "reproduce", fake)
    assert clair("reproduce").exit_code == 0
    assert clair("reproduce", "00", "--profile", "paper", "--jobs", 2, "--force").exit_code == 1
    result = clair("reproduce", "unknown")
    assert result.exit_code == 2 and result.stderr == "clair: no notebook 'unknown'\n"
    assert calls[0][0] is None and calls[0][1]["figures"] is None and calls[0][1]["profile"] == "smoke"
    assert calls[1][0] == ["00"] and calls[1][1]["figures"] == Path("figures")
    assert calls[1][1]["jobs"] == 2 and calls[1][1]["force"] is True


def test_bench_prints_the_median_ratio() -> None:
    result = clair("bench", "convex", "--instances", 1)
    assert result.exit_code == 0 and "median speed ratio" in result.stdout


def test_picture_is_closed_when_saved(work: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    for options in ((), ("--overwrite",)):
        assert clair("align", work / "clients", "--output", work / "out", "--quiet", *options).exit_code == 0
    assert plt.get_fignums() == before


def test_sigterm_leaves_nothing(work: Path) -> None:
    wait = """
import signal
import clairlib.alignment.align
from clairlib.cli import app

def settle(*_, **__):
    print("fitting", flush=True)
    signal.pause()

clairlib.alignment.align.iterate_verdict_on_disk = settle
app()
"""
    before = snapshot(work)
    command = [sys.executable, "-c", wait, "align", "clients", "--output", "out"]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "fitting\n"
        assert any(path.name.endswith(".partial") for path in work.iterdir())
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=HANG_SECONDS) == ("", "")
    assert process.returncode == 128 + signal.SIGTERM and snapshot(work) == before


def test_failure_while_drawing_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("clairlib.cli.commands.save_overview", fail)
    before = snapshot(work)
    result = clair("align", work / "clients", "--output", work / "out")
    assert isinstance(result.exception, RuntimeError) and snapshot(work) == before


def test_report_without_claims_ends_with_one_line(tmp_path):
    result = subprocess.run([sys.executable, "-m", "clairlib", "report"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "claims.toml" in result.stderr and len(result.stderr.splitlines()) == 1
