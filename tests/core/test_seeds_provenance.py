"""Named seeds, and what a result says about how it was made."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest
import torch

from clairlib.core.provenance import collect, git_state
from clairlib.core.seeds import derive


def draw(*key) -> list[float]:
    return torch.randn(4, generator=derive(*key)).tolist()


def test_a_seed_is_the_sha256_of_its_path():
    start = int.from_bytes(hashlib.sha256(b"3/client/7").digest()[:8], "little")
    assert derive(3, "client", 7).initial_seed() == start


def test_a_draw_is_the_same_in_another_process():
    code = (
        "import torch; from clairlib.core.seeds import derive\n"
        "print(torch.randn(4, generator=derive(3, 'a', 1)).tolist())"
    )
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(other.stdout) == draw(3, "a", 1)


def test_every_name_and_their_order_matter_and_earlier_draws_do_not():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, 1), (0, 11)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    before = draw(0, "client", 3)
    torch.manual_seed(1)
    draw(0, "client", 11)
    assert draw(0, "client", 3) == before


def test_deriving_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(2).tolist()
    torch.manual_seed(5)
    derive(0, "x")
    assert torch.randn(2).tolist() == expected


def test_a_name_with_a_slash_is_refused():
    with pytest.raises(ValueError, match="'a/b'"):
        derive(0, "a/b")


def test_provenance_is_json_and_says_versions_device_code_and_time():
    facts = collect(profile="smoke", seed=3)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert (facts["profile"], facts["seed"]) == ("smoke", 3)
    assert datetime.fromisoformat(facts["time"]).utcoffset() is not None
    assert facts["device"] and facts["processors"] >= 1


def test_provenance_names_no_path_and_no_home():
    text = json.dumps(collect())
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert str(Path.home()) not in text


def test_an_extra_field_may_not_hide_a_collected_one():
    with pytest.raises(ValueError, match="device"):
        collect(device="none")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_state_knows_the_commit_and_whether_files_changed(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None, "no commit yet"
    (tmp_path / "figures").mkdir()
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "figures/a.csv").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(tmp_path) == clean
    (tmp_path / "figures/a.csv").write_text("2")
    assert git_state(tmp_path) == clean, "results do not make the code dirty"
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None, "an enclosing repository is someone else's"


def test_git_state_without_git_or_checkout_is_none(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(Path(__file__).resolve().parents[2]) is None
