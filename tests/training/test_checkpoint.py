"""Training that was killed goes on to the identical result; a checkpoint of anything else is refused."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clairlib.training import ClientData, Schedule, train_adapters
from clairlib.training import trainer as training
from helpers.processes import HANG_SECONDS
from helpers.sequential import tiny_llama, tokens_of
from helpers.training_clients import CLIENTS, PARTS, SEED

TARGETS = ["o_proj", "down_proj"]
VALIDATING = [dataclasses.replace(CLIENTS[0], validation=tokens_of(3, seed=8)), *CLIENTS[1:]]
SCHEDULE = dataclasses.replace(PARTS, check_every=2)  # 9, 3 and 6 steps: bob is done at 3, cleo at 6


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)


def train(clients=VALIDATING, schedule=SCHEDULE, model=None, targets=TARGETS, seed=SEED, **options):
    return train_adapters(model or tiny_llama(), clients, targets, schedule, seed=seed, **options)


def assert_identical(trained, expected):
    for own, other in zip(trained, expected, strict=True):
        assert torch.equal(own.losses, other.losses) and own.best_step == other.best_step
        assert own.diverged_at == other.diverged_at and set(own.updates) == set(other.updates)
        for name, update in own.updates.items():
            same = other.updates[name]
            if isinstance(update, torch.Tensor):
                assert torch.equal(update, same)
            else:
                assert torch.equal(update.A, same.A) and torch.equal(update.B, same.B) and update.scale == same.scale


class Interrupted(Exception):
    pass


def interrupt_after(calls):
    def progress(done, total):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Interrupted

    return progress


@pytest.mark.parametrize("steps", [1, 4, 7, 9])  # nobody, bob, bob and cleo, everybody done
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "matrices"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(steps, full, tmp_path):
    clients = [dataclasses.replace(client, rank=None) for client in VALIDATING] if full else VALIDATING
    with pytest.raises(Interrupted):
        train(clients, checkpoint=tmp_path / "state", progress=interrupt_after(steps))
    seen = []
    trained = train(clients, checkpoint=tmp_path / "state", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 9 - steps and all(total == 18 for _, total in seen)
    assert_identical(trained, train(clients))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert_identical(train(clients, checkpoint=tmp_path / "state", progress=interrupt_after(1)), trained)


def test_a_diverged_client_stays_so_after_resuming(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = torch.nan
    good = [dict(e, input_ids=e["input_ids"].clamp(max=38)) for e in CLIENTS[0].examples]
    bad = [dict(good[0], input_ids=good[0]["input_ids"].index_fill(0, torch.tensor([0]), 39))]
    clients = [ClientData("bad", bad), ClientData("good", good)]
    with pytest.raises(Interrupted):
        train(clients, model=model, checkpoint=tmp_path / "state", progress=interrupt_after(2))
    trained = train(clients, model=model, checkpoint=tmp_path / "state")
    assert [own.status for own in trained] == ["diverged", "trained"]
    expected = train(clients, model=model)
    assert trained[0].diverged_at == expected[0].diverged_at == 1
    assert_identical(trained[1:], expected[1:])


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from clairlib.training import trainer
from test_checkpoint import train
trainer.CHECKPOINT_SECONDS = 0.0
steps = []
def progress(done, total):
    steps.append(done)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train(checkpoint=Path(sys.argv[1]), progress=progress)
"""


def test_a_killed_process_is_taken_up_where_it_was(tmp_path):
    state = tmp_path / "state"
    code = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(state)], env=env, capture_output=True, timeout=HANG_SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    seen = []
    trained = train(checkpoint=state, progress=lambda *at: seen.append(at))
    assert len(seen) == 4
    assert_identical(trained, train())


def test_a_checkpoint_of_anything_else_is_refused(tmp_path):
    state = tmp_path / "state"
    train(checkpoint=state)
    other_data = [*VALIDATING[:2], dataclasses.replace(CLIENTS[2], examples=tokens_of(6, seed=99))]
    other_model = tiny_llama()
    with torch.no_grad():
        other_model.model.embed_tokens.weight += 1e-6
    changes = [
        {"seed": SEED + 1},
        {"schedule": dataclasses.replace(SCHEDULE, learning_rate=1e-3)},
        {"targets": ["o_proj"]},
        {"clients": other_data},
        {"clients": [dataclasses.replace(VALIDATING[0], alpha=1.0), *VALIDATING[1:]]},
        {"clients": VALIDATING[:2]},
        {"model": other_model},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="is of other settings, data or model; remove it or name another"):
            train(checkpoint=state, **change)
    train(checkpoint=state)


@pytest.mark.parametrize("content", [b"", b"{}", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match="state' cannot be read") as caught:
        train(checkpoint=tmp_path / "state")
    assert "\n" not in str(caught.value) and (tmp_path / "state").read_bytes() == content


def test_other_safetensors_are_no_checkpoint(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "state")
    with pytest.raises(ValueError, match="cannot be read"):
        train(checkpoint=tmp_path / "state")


def test_nothing_is_written_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(schedule=Schedule(steps=1))
    assert list(tmp_path.iterdir()) == []
