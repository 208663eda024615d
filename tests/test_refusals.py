"""Bad input to ``clair align`` ends with code 2 and one line naming the culprit; nothing is left behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_clients import CONFIG, PICKLE, WEIGHTS, clair, plant, snapshot
from safetensors.torch import load_file, save_file

O_PROJ = "model.layers.1.self_attn.o_proj"
KEY = f"base_model.model.{O_PROJ}.lora_%s.weight"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "clients"
    plant(folder)
    return folder


@pytest.fixture
def work(planted: Path, tmp_path: Path) -> Path:
    """A folder of its own with a copy of the clients in it."""
    shutil.copytree(planted, tmp_path / "clients")
    return tmp_path


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


def nan_at(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][1, 2] = value

    return change


def drop(text: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if text in key]:
            del tensors[key]

    return change


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config-missing": (lambda c: (c / CONFIG).unlink(), [CONFIG, "missing"]),
    "weights-missing": (lambda c: (c / WEIGHTS).unlink(), [WEIGHTS, "missing"]),
    "weights-truncated": (lambda c: truncate_file(c / WEIGHTS), [WEIGHTS, "truncated"]),
    "weights-empty": (lambda c: (c / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "not-safetensors": (lambda c: (c / WEIGHTS).write_text("no tensors here " * 9), [WEIGHTS, "safetensors"]),
    "weights-a-folder": (
        lambda c: ((c / WEIGHTS).unlink(), (c / WEIGHTS).mkdir()),
        [WEIGHTS, "not a regular file"],
    ),
    "config-truncated": (lambda c: truncate_file(c / CONFIG), [CONFIG, "JSON"]),
    "config-a-list": (lambda c: (c / CONFIG).write_text("[]"), [CONFIG, "object"]),
    "config-nested": (lambda c: (c / CONFIG).write_text("[" * 100_000), [CONFIG, "JSON"]),
    "config-huge": (lambda c: (c / CONFIG).write_text(" " * 2_000_000 + "{}"), [CONFIG, "larger"]),
    "nan": (lambda c: edit_tensors(c / WEIGHTS, nan_at(KEY % "B", float("nan"))), [KEY % "B", "NaN"]),
    "inf": (lambda c: edit_tensors(c / WEIGHTS, nan_at(KEY % "A", float("inf"))), [KEY % "A", "infinite"]),
    "module-missing": (lambda c: edit_tensors(c / WEIGHTS, drop(O_PROJ)), [O_PROJ, "lacks"]),
    "module-extra": (
        lambda c: edit_tensors(
            c / WEIGHTS,
            put(
                **{
                    "base_model.model.x.lora_A.weight": torch.ones(4, 5),
                    "base_model.model.x.lora_B.weight": torch.ones(6, 4),
                }
            ),
        ),
        ["'x'", "has module"],
    ),
    "factor-missing": (lambda c: edit_tensors(c / WEIGHTS, drop(KEY % "B")), [O_PROJ, "lora_A"]),
    "factors-do-not-fit": (
        lambda c: edit_tensors(c / WEIGHTS, put(**{KEY % "B": torch.ones(32, 3)})),
        [O_PROJ, "(32, 3)", "(4, 32)"],
    ),
    "shape-differs": (
        lambda c: edit_tensors(c / WEIGHTS, put(**{KEY % "B": torch.ones(30, 4)})),
        [O_PROJ, "(30, 32)", "(32, 32)"],
    ),
    "rank-not-as-stated": (lambda c: edit(c / CONFIG, r=8), ["rank 4", "says 8"]),
    "rank-no-number": (lambda c: edit(c / CONFIG, r="4"), [CONFIG, "'r'"]),
    "alpha-missing": (lambda c: edit(c / CONFIG, lora_alpha=None), [CONFIG, "lora_alpha"]),
    "alpha-infinite": (lambda c: edit(c / CONFIG, lora_alpha=float("inf")), [CONFIG, "lora_alpha"]),
    "rslora-no-bool": (lambda c: edit(c / CONFIG, use_rslora="no"), [CONFIG, "use_rslora"]),
    "pattern-no-object": (lambda c: edit(c / CONFIG, rank_pattern=[1]), [CONFIG, "rank_pattern"]),
    "pattern-invalid": (lambda c: edit(c / CONFIG, alpha_pattern={"o_proj(": 3}), [CONFIG, "o_proj("]),
    "pattern-endless": (
        lambda c: edit(c / CONFIG, alpha_pattern={r"(?:(?:\w|\.)+?)+?\d\d": 3}),
        [CONFIG, "too long"],
    ),
    "other-base": (lambda c: edit(c / CONFIG, base_model_name_or_path="other"), ["'other'", "'tiny-llama'"]),
    "other-revision": (lambda c: edit(c / CONFIG, revision="v2"), ["'v2'", "'tiny-llama'"]),
    "dora": (lambda c: edit(c / CONFIG, use_dora=True), ["DoRA", "use_dora"]),
    "bias": (lambda c: edit(c / CONFIG, bias="all"), ["bias", "'all'"]),
    "lora-bias": (lambda c: edit(c / CONFIG, lora_bias=True), ["lora_bias"]),
    "modules-to-save": (lambda c: edit(c / CONFIG, modules_to_save=["lm_head"]), ["modules_to_save"]),
    "changed-base": (lambda c: edit(c / CONFIG, init_lora_weights="pissa_niter_4"), ["pissa_niter_4"]),
    "peft-type": (lambda c: edit(c / CONFIG, peft_type="LOHA"), ["LOHA"]),
    "embedding": (
        lambda c: edit_tensors(
            c / WEIGHTS, put(**{"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)})
        ),
        ["embed_tokens", "embedding"],
    ),
    "convolution": (
        lambda c: edit_tensors(c / WEIGHTS, put(**{KEY % "A": torch.ones(4, 3, 3, 3)})),
        [KEY % "A", "convolution"],
    ),
    "unknown-tensor": (
        lambda c: edit_tensors(c / WEIGHTS, put(**{"base_model.model.lm_head.weight": torch.ones(3)})),
        ["base_model.model.lm_head.weight"],
    ),
    "integers": (
        lambda c: edit_tensors(c / WEIGHTS, put(**{KEY % "B": torch.ones(32, 4, dtype=torch.int8)})),
        [KEY % "B", "I8"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("client", ["ada", "finn"])  # the first client must not become everybody's yardstick
def test_bad_file_is_refused(work: Path, client: str, name: str) -> None:
    spoil, culprits = BAD_FILES[name]
    spoil(work / "clients" / client)
    refused(work, f"client '{client}'", *culprits)


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
    header = json.dumps(
        {KEY % "A": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    ).encode()
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


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "report.json"])
def test_client_name_unfit_for_the_output_is_refused(work: Path, name: str) -> None:
    (work / "clients/ada").rename(work / "clients" / name)
    refused(work, "cannot be a client's name")


@pytest.mark.parametrize("option", ["rank", "adapter-rank"])
@pytest.mark.parametrize(("value", "culprit"), [(25, "down_proj"), (0, "at least 1"), (-1, "at least 1")])
def test_rank_beyond_the_update_is_refused(work: Path, option: str, value: int, culprit: str) -> None:
    arguments = ("clients", "--output", "out", f"--{option}", value)
    refused(work, option.replace("-", " "), str(value), culprit, arguments=arguments)


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


def test_refusal_of_the_fit_is_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: object, **__: object) -> None:
        raise ValueError("module 'm' has\nno shared\x1b subspace")

    monkeypatch.setattr("clairlib.alignment.CLAIR.fit", fit)
    refused(work, "module 'm' has no shared subspace\n")


def test_bad_input_in_a_process_of_its_own_prints_one_line(work: Path) -> None:
    truncate_file(work / "clients/bob" / WEIGHTS)
    command = [
        sys.executable,
        "-c",
        "from clairlib.cli import app; app()",
        "align",
        "clients",
        "--output",
        "out",
    ]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "client 'bob'" in done.stderr
    assert [path.name for path in work.iterdir()] == ["clients"]
