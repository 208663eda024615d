"""Output folders appear whole or not at all, and replace nothing but what an earlier run wrote."""

import json
import os
from pathlib import Path

import pytest

from clairlib.core import files as folders
from clairlib.core.files import AdapterError, whole_folder

REPORT = json.dumps({"clients": [{"name": "ada"}], "modules": [], "settings": {}, "provenance": {}})


def test_output_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as folder:
        assert not (tmp_path / "out").exists()
        (folder / "report.json").write_text("first")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(AdapterError, match="exists"), whole_folder(tmp_path / "out"):
        raise AssertionError("the block must not run")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text(REPORT)
        for name in ("report.png", "ada/adapter_config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("first")
    return tmp_path / "out"


def test_overwriting_replaces_the_folder_only_at_the_end(written: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(written, overwrite=True):
        raise RuntimeError
    assert (written / "report.json").read_text() == REPORT
    with whole_folder(written, overwrite=True) as folder:
        (folder / "other").write_text("second")
        assert (written / "report.json").read_text() == REPORT
    assert [p.name for p in written.iterdir()] == ["other"]
    assert [p.name for p in written.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [OSError("full"), KeyboardInterrupt()])
def test_old_output_comes_back_when_the_swap_fails(written: Path, monkeypatch, failure: BaseException) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise failure
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", failing)
    expected = AdapterError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected), whole_folder(written, overwrite=True):
        pass
    assert (written / "report.json").read_text() == REPORT
    assert [p.name for p in written.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "report",
    [
        None,
        "{}",
        "not JSON",
        "[" * 100_000,
        '[{"clients": []}]',
        '{"clients": []}',
        '{"clients": ["thesis"], "modules": [], "settings": {}}',
    ],
    ids=["none", "empty", "text", "nested", "list", "incomplete", "names"],
)
def test_overwriting_refuses_a_folder_that_clair_did_not_write(tmp_path: Path, report: str | None) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis").write_text("years of work")
    if report is not None:
        (tmp_path / "thesis" / "report.json").write_text(report)
    with pytest.raises(AdapterError, match="not written by clair"), whole_folder(tmp_path / "thesis", overwrite=True):
        pass
    assert (tmp_path / "thesis" / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.txt", "bob", ".git"])
def test_overwriting_refuses_what_somebody_put_beside_the_clients(written: Path, name: str) -> None:
    (written / name).mkdir()
    with pytest.raises(AdapterError, match=rf"holds '{name}', not written by clair"):
        with whole_folder(written, overwrite=True):
            pass
    assert (written / name).exists() and (written / "ada").exists()
