"""Adapters opened without being read, read a module at a time, and written a module at a time."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clairlib import LowRank
from clairlib.adapters import folder as lora
from clairlib.adapters import open_adapters
from clairlib.adapters.folder import open_lora, read_lora, write_lora
from clairlib.adapters.tensors import DTYPES, Factors, Place, largest, read_header, read_tensor, room_for
from clairlib.adapters.writer import AdapterWriter
from clairlib.core.files import AdapterError
from helpers.adapter_clients import CONFIG, WEIGHTS, edit, edit_tensors, lora_layers, scaled, tiny_llama, truncate_file

BASE = {"base_model_name_or_path": "tiny"}
NAMES = ["ada", "bob", "cleo"]
SHAPES = {"first": (8, 7), "second.proj": (5, 9), "größe": (6, 3)}


def key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def mixed_updates() -> dict[str, LowRank]:
    """Other dtypes in every factor, odd sizes, several ranks."""
    pairs = [("F16", "F64"), ("BF16", "F32"), ("F32", "F16")]
    return {
        module: LowRank(normal(p, rank, dtype=DTYPES[b]), normal(rank, q, dtype=DTYPES[a]), 0.5 * rank)
        for (module, (p, q)), (b, a), rank in zip(SHAPES.items(), pairs, (1, 3, 2), strict=True)
    }


def equal(one: LowRank, other: LowRank) -> bool:
    same = one.B.dtype == other.B.dtype and one.A.dtype == other.A.dtype and one.scale == other.scale
    return same and torch.equal(one.B, other.B) and torch.equal(one.A, other.A)


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """Three clients, of rank 1, 2 and 3 with the scale 3 divided by it."""
    torch.manual_seed(0)
    for rank, name in enumerate(NAMES, start=1):
        updates = {module: LowRank(normal(p, rank), normal(rank, q), 3.0 / rank) for module, (p, q) in SHAPES.items()}
        (tmp_path / "clients").mkdir(exist_ok=True)
        write_lora(tmp_path / "clients" / name, BASE, updates)
    return tmp_path / "clients"


def refusing(*_: object) -> None:
    raise AssertionError("a tensor was read")


def test_what_is_known_without_reading_is_what_is_read(clients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "read_tensor", refusing)
    files = open_adapters([clients])
    monkeypatch.undo()
    assert files.names == NAMES and files.folders == [clients / name for name in NAMES]
    assert len(files.configs) == len(NAMES) and files.load().keys() == files.modules.keys()
    assert set(files.modules) == set(SHAPES)
    total = 0
    for module, known in files.modules.items():
        read = files.read(module)
        assert [Factors.of(update) for update in read] == [
            Factors(own.p, own.q, own.rank, own.B_dtype, own.A_dtype, own.scale) for own in known
        ]
        sizes = [update.B.nbytes + update.A.nbytes for update in read]
        assert files.module_bytes[module] == sum(sizes) and [own.bytes for own in known] == sizes
        total += sum(sizes)
    assert files.bytes == total


def test_every_way_to_read_gives_what_safetensors_reads(clients: Path) -> None:
    write_lora(clients / "dan", BASE, mixed_updates())
    files, loaded = open_adapters([clients]), open_adapters([clients]).load()
    again = pickle.loads(pickle.dumps(files))  # as another process gets it
    for k, name in enumerate(files.names):
        tensors = load_file(clients / name / WEIGHTS)
        for module in SHAPES:
            scale = files.modules[module][k].scale
            expected = LowRank(tensors[key(module, "B")], tensors[key(module, "A")], scale)
            ways = files.read(module)[k], again.read(module)[k], loaded[module][k]
            assert all(equal(way, expected) for way in (*ways, read_lora(clients / name)[1][module]))


@pytest.mark.parametrize("order", [["B", "A"], ["A", "B"]])
def test_tensors_may_lie_in_any_order_and_unaligned(tmp_path: Path, order: list[str]) -> None:
    values = {"B": normal(3, 1, dtype=torch.bfloat16), "A": normal(1, 5)}  # 6 bytes before 20, or 20 before 6
    header, data = {}, b""
    for factor in order:
        raw = values[factor].view(-1).view(torch.uint8).numpy().tobytes()
        dtype = "F32" if factor == "A" else "BF16"
        place = {"shape": list(values[factor].shape), "data_offsets": [len(data), len(data) + len(raw)]}
        header[key("m", factor).replace(".weight", ".default.weight")] = {"dtype": dtype} | place
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / CONFIG).write_text(json.dumps(BASE | {"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    assert equal(read_lora(tmp_path)[1]["m"], LowRank(values["B"], values["A"], 2.0))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as on Linux")
def test_no_file_stays_open(clients: Path) -> None:
    before = os.listdir("/proc/self/fd")
    files = open_adapters([clients])
    updates = files.read("first")
    assert os.listdir("/proc/self/fd") == before and len(updates) == 3


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")


def swap_for(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        put(path)

    return change


CHANGES = {
    "truncated": truncate_file,
    "overwritten": rewrite,
    "replaced": swap_for(lambda path: shutil.copyfile(path.parent.with_name("ada") / WEIGHTS, path)),
    "removed": Path.unlink,
    "pipe": swap_for(os.mkfifo),
    "folder": swap_for(Path.mkdir),
    "link": swap_for(lambda path: path.symlink_to("/etc/passwd")),
    "moved": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_file_that_changes_after_it_was_opened_is_refused(clients: Path, kind: str) -> None:
    os.utime(clients / "bob" / WEIGHTS, (1e9, 1e9))  # the clock of some file systems is slower than this test
    files = open_adapters([clients])
    CHANGES[kind](clients / "bob" / WEIGHTS)
    with pytest.raises(AdapterError, match=f"^client 'bob': {WEIGHTS} (.*changed while|cannot be read)") as caught:
        files.read("first")
    assert str(caught.value).isprintable()


def test_file_that_changes_while_it_is_read_is_refused(clients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = open_adapters([clients]), clients / "cleo" / WEIGHTS

    def read_and_change(file: FileIO, place: Place, room: torch.Tensor) -> torch.Tensor:
        values = read_tensor(file, place, room)
        if file.name == path:
            os.utime(path, (1e9, 1e9))
        return values

    monkeypatch.setattr(lora, "read_tensor", read_and_change)
    with pytest.raises(AdapterError, match="client 'cleo': .* changed while"):
        files.read("first")


def test_file_that_ends_too_early_is_refused(clients: Path) -> None:
    path = clients / "ada" / WEIGHTS
    place = max((place for own in read_header(path).values() for place in own.values()), key=lambda own: own.offset)
    with FileIO(path) as file:
        assert read_tensor(file, place, room_for(place.room)).shape == place.shape
        with pytest.raises(AdapterError, match=f"ends before tensor {place.key!r}"):
            read_tensor(file, place._replace(offset=place.offset + 1), room_for(place.room))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_entry_that_is_not_finite_escapes(dtype: torch.dtype, value: str) -> None:
    clean = normal(7, 19, dtype=dtype)
    assert largest(clean) == float(clean.double().abs().max()) and largest(-clean) == largest(clean)
    for place in range(clean.numel()):  # vectorised code has a tail of its own
        spoilt = clean.clone()
        spoilt.view(-1)[place] = float(value)
        assert not largest(spoilt) < float("inf")


def test_nan_is_found_on_reading_and_named(clients: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key("second.proj", "A")][1, 2] = float("nan")

    edit_tensors(clients / "bob" / WEIGHTS, spoil)
    files = open_adapters([clients])
    assert len(files.read("first")) == 3
    with pytest.raises(AdapterError, match=r"client 'bob': tensor '.*second\.proj\.lora_A\.weight' has NaN"):
        files.read("second.proj")


def test_size_of_an_update_is_judged_by_its_norms(tmp_path: Path) -> None:
    B, A = torch.zeros(400, 1), torch.full((1, 4), 0.25)  # norms 9e29 and 1/2
    B[3] = 9e29  # times sqrt(400) would be too large
    write_lora(tmp_path / "a", BASE, {"m": LowRank(B, A, 2.0)})
    assert equal(read_lora(tmp_path / "a")[1]["m"], LowRank(B, A, 2.0))
    edit_tensors(tmp_path / "a" / WEIGHTS, scaled(1.2))
    with pytest.raises(AdapterError, match="module 'm': the update is too large"):
        read_lora(tmp_path / "a")


def test_rank_beyond_both_sides_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "read_tensor", refusing)
    for rank in (8, 9):
        write_lora(tmp_path / str(rank), BASE, {"m": LowRank(normal(2, rank), normal(rank, 8))})
    assert open_lora(tmp_path / "8").modules["m"].rank == 8  # a classifier of two labels
    with pytest.raises(AdapterError, match="more rank than the update"):
        open_lora(tmp_path / "9")


def planned(updates: dict[str, LowRank]) -> dict[str, Factors]:
    return {module: Factors.of(update) for module, update in updates.items()}


def test_file_written_is_that_of_safetensors_byte_for_byte(tmp_path: Path) -> None:
    updates = mixed_updates()
    tensors = {key(m, f): getattr(update, f) for m, update in updates.items() for f in "BA"}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_lora(tmp_path / "ours", BASE, updates)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_modules_written_in_any_order_by_several_writers_load_in_peft(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["o_proj", "down_proj"], "init_lora_weights": False}
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).save_pretrained(tmp_path / "a")
    config, updates = read_lora(tmp_path / "a")
    for module, rank in zip(updates, (1, 3, 3, 5), strict=True):
        p, q = updates[module].shape
        updates[module] = LowRank(normal(p, rank), normal(rank, q), 0.7 * rank)
    writer = AdapterWriter(tmp_path / "b", config, planned(updates))
    writer.create()
    copies = [pickle.loads(pickle.dumps(writer)) for _ in updates]  # all that processes would share is the path
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: pair[0].write(*pair[1]), zip(copies, reversed(updates.items()), strict=True)))
    writer.finish()
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[name].dense())


def test_another_process_goes_on_with_a_folder_half_written(tmp_path: Path) -> None:
    updates = mixed_updates()
    write_lora(tmp_path / "whole", BASE, updates)
    AdapterWriter(tmp_path / "half", BASE, planned(updates)).create()
    code = "import pickle, sys; writer, *pair = pickle.load(sys.stdin.buffer); writer.write(*pair)"
    work = pickle.dumps((AdapterWriter(tmp_path / "half", BASE, planned(updates)), "größe", updates["größe"]))
    subprocess.run([sys.executable, "-c", code], input=work, check=True)
    rest = AdapterWriter(tmp_path / "half", BASE, planned(updates))
    for module in ("first", "second.proj"):
        rest.write(module, updates[module])
    rest.finish()
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_loads_a_folder_that_is_not_finished(tmp_path: Path) -> None:
    updates = mixed_updates()
    writer = AdapterWriter(tmp_path / "a", BASE, planned(updates))
    writer.create()
    for module, update in updates.items():
        writer.write(module, update)
    assert (tmp_path / "a" / WEIGHTS).stat().st_size == writer.bytes
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match=CONFIG):
        open_lora(tmp_path / "a")


OWN = LowRank(torch.ones(8, 1), torch.ones(1, 7), 2.0)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"B": torch.ones(8, 2), "A": torch.ones(2, 7)}, "lora_B is (8, 2)"),
    "columns": ({"A": torch.ones(1, 6)}, "lora_A is (1, 6)"),
    "dtype": ({"A": torch.ones(1, 7, dtype=torch.float64)}, "torch.float64, not (1, 7) torch.float32"),
    "scale": ({"scale": 1.0}, "scale 1.0, not 2.0"),
    "overflow": ({"B": torch.full((8, 1), float("inf"))}, "lora_B does not fit into torch.float32"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_update_not_as_announced_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    changes, culprit = WRONG[kind]
    writer = AdapterWriter(tmp_path / "a", BASE, {"first": Factors.of(OWN)})
    writer.create()
    with pytest.raises(AdapterError, match="module 'first'") as caught:
        writer.write("first", replace(OWN, **changes))
    assert culprit in str(caught.value)
    assert not any((tmp_path / "a" / WEIGHTS).read_bytes())


def test_clients_own_factors_announce_an_update_of_another_rank(clients: Path, tmp_path: Path) -> None:
    files = open_adapters([clients])
    announced = {module: replace(known[2], rank=1, scale=1.0) for module, known in files.modules.items()}
    writer = AdapterWriter(tmp_path / "out", files.configs[2], announced)
    writer.create()
    for module, (p, q) in SHAPES.items():
        writer.write(module, LowRank(torch.ones(p, 1), torch.ones(1, q)))
    writer.finish()
    config, updates = read_lora(tmp_path / "out")
    assert config["r"] == 1 and config["base_model_name_or_path"] == "tiny"
    assert all(torch.equal(update.dense(), torch.ones(update.shape)) for update in updates.values())


def test_clients_that_differ_are_refused_unread(clients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "read_tensor", refusing)
    edit(clients / "bob" / CONFIG, base_model_name_or_path="other")
    with pytest.raises(AdapterError, match="client 'bob' has base model 'other'"):
        open_adapters([clients])
