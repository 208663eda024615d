"""Bad input to ``clair align`` ends with code 2 and one line naming the culprit; nothing is left behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clairlib import CLAIR
from clairlib.recovery.inputs import Module
from clairlib.recovery.module_fit import ModuleFit
from helpers.adapter_clients import (
    CONFIG,
    KEY,
    O_PROJ,
    PICKLE,
    WEIGHTS,
    clair,
    edit_tensors,
    put,
    refused,
    scaled,
    truncate_file,
)


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_pickle_is_named_and_never_opened(work: Path) -> None:
    (work / "clients/bob" / WEIGHTS).unlink()
    (work / "clients/bob" / PICKLE).write_bytes(pickle.dumps(Bomb()))
    refused(work, "client 'bob'", PICKLE, "never opened")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_link_out_of_the_folder_is_refused(work: Path, file: str) -> None:
    (work / "clients/bob" / file).rename(work / "elsewhere")
    (work / "clients/bob" / file).symlink_to(work / "elsewhere")
    refused(work, "client 'bob'", file, "leads outside")


def test_header_that_declares_more_than_the_file_holds_is_refused(work: Path) -> None:
    header = json.dumps({KEY % "A": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    (work / "clients/bob" / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    refused(work, "client 'bob'", WEIGHTS)


def test_hostile_tensor_name_stays_on_one_line(work: Path) -> None:
    name = "base_model.model.a\nclair: all good\x1b[2J[red]"
    edit_tensors(work / "clients/bob" / WEIGHTS, put(**{name: torch.ones(2, 2)}))
    refused(work, "client 'bob'", "all good")


def test_fewer_than_three_clients_are_refused(work: Path) -> None:
    refused(work, "at least 3", "got 2", arguments=("clients/ada", "clients/bob", "--output", "out"))
    refused(work, "at least 3", "got 1", arguments=("clients/ada", "--output", "out"))
    (work / "empty").mkdir()
    refused(work, "at least 3", arguments=("empty", "--output", "out"))


def test_two_clients_of_one_name_are_refused(work: Path) -> None:
    shutil.copytree(work / "clients/ada", work / "more/ada")
    folders = ("clients/ada", "clients/bob", "clients/cleo", "more/ada")
    refused(work, "two clients", "'ada'", arguments=(*folders, "--output", "out"))


def test_missing_client_folder_is_refused(work: Path) -> None:
    folders = ("clients/ada", "clients/bob", "clients/nobody")
    refused(work, "nobody", "not a folder", arguments=(*folders, "--output", "out"))


def test_subfolder_without_an_adapter_is_not_skipped(work: Path) -> None:
    (work / "clients/logs").mkdir()
    refused(work, "client 'logs'", CONFIG)


def test_names_that_differ_in_case_only_are_refused(work: Path) -> None:
    shutil.copytree(work / "clients/ada", work / "more/STRASSE")
    shutil.copytree(work / "clients/ada", work / "clients/straße")
    folders = ("clients/bob", "clients/cleo", "clients/straße", "more/STRASSE")
    refused(work, "two clients", "case aside", "'STRASSE'", "straße'", arguments=(*folders, "--output", "out"))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "report.json", "Report.JSON", "REPORT.png"])
def test_client_name_unfit_for_the_output_is_refused(work: Path, name: str) -> None:
    (work / "clients/ada").rename(work / "clients" / name)
    refused(work, "cannot be a client's name")


@pytest.mark.parametrize(
    ("option", "value", "culprits"),
    [
        ("adapter-rank", 25, ["adapter rank 25", "down_proj", "at most 24"]),
        ("adapter-rank", 0, ["adapter rank", "at least 1", "got 0"]),
        ("adapter-rank", -1, ["adapter rank", "at least 1", "got -1"]),
        ("rank", 33, ["rank 33", "module 'model.layers.", "allow, 32"]),
        ("rank", -1, ["clair: rank", "-1"]),
    ],
)
def test_rank_beyond_the_update_is_refused(work: Path, option: str, value: int, culprits: list[str]) -> None:
    refused(work, *culprits, arguments=("clients", "--output", "out", f"--{option}", value))


def test_unwritable_output_is_refused(work: Path) -> None:
    (work / "file").write_text("in the way")
    refused(work, "cannot write", "out", arguments=("clients", "--output", "file/out"))
    refused(work, "cannot write", "out", arguments=("clients", "--output", "nowhere/out"))
    refused(work, "not a folder", "file", arguments=("clients", "--output", "file", "--overwrite"))


@pytest.mark.parametrize("place", ["clients", "clients/ada", "clients/ada/out", "clients/out", "."])
def test_output_that_overlaps_the_input_is_refused(work: Path, place: str) -> None:
    refused(work, "input folder", arguments=("clients", "--output", place, "--overwrite"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is there")
def test_missing_device_is_refused(work: Path) -> None:
    refused(work, "cuda", arguments=("clients", "--output", "out", "--device", "cuda"))


FIRST, SECOND = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"  # order of the files


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(f"module {O_PROJ!r} has\nno shared\x1b subspace"), f"module {O_PROJ!r} has no shared subspace"),
        (ValueError("client 'bob' is odd"), "client 'bob' is odd"),
        (ValueError("nu must be finite"), f"module {SECOND!r}: nu must be finite"),
        (torch.linalg.LinAlgError("eigh did not\nconverge"), f"module {SECOND!r}: eigh did not converge"),
        (torch.OutOfMemoryError("tried to allocate\n9 GiB"), f"module {SECOND!r}: out of memory on device cpu"),
    ],
)
def test_refusal_of_the_fit_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    first_frame = CLAIR.first_frame

    def failing(self: CLAIR, module: Module, fit: ModuleFit) -> Any:
        if module.name == FIRST:
            return first_frame(self, module, fit)
        raise error

    monkeypatch.setattr(CLAIR, "first_frame", failing)
    refused(work, f"clair: {line}\n")


def test_adapters_that_all_overflow_are_refused(work: Path) -> None:
    for client in (work / "clients").iterdir():
        edit_tensors(client / WEIGHTS, scaled(1e100))
    refused(work, "client 'ada'", "module", "too large")


def test_file_that_changes_after_the_check_is_not_copied(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clairlib.alignment import align as alignment

    iterate_verdict, bad = alignment.iterate_verdict_on_disk, work / "clients/bad_1"

    def settle_and_swap(*arguments: Any, **options: Any) -> Any:
        settled = iterate_verdict(*arguments, **options)
        (bad / CONFIG).unlink()
        (bad / CONFIG).symlink_to("/etc/passwd")
        return settled

    monkeypatch.setattr(alignment, "iterate_verdict_on_disk", settle_and_swap)
    arguments = ("align", work / "clients", "--output", work / "out", "--keep-contaminated")
    result = clair(*arguments)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "client 'bad_1'" in result.stderr and "leads outside" in result.stderr
    assert [path.name for path in work.iterdir()] == ["clients"]


def test_bad_input_in_a_process_of_its_own_prints_one_line(work: Path) -> None:
    truncate_file(work / "clients/bob" / WEIGHTS)
    command = [
        sys.executable,
        "-c",
        "from clairlib.cli.commands import app; app()",
        "align",
        "clients",
        "--output",
        "out",
    ]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "client 'bob'" in done.stderr
    assert [path.name for path in work.iterdir()] == ["clients"]
