"""Ways to spoil an adapter folder, for the fuzz test: each takes a random generator and the folder of one client."""

import json
import os
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Header = dict[str, Any]

NESTED = "[" * 100_000
NAMES = [
    "../../evil", "/etc/passwd", "..", ".", "a/../../../b", "a\0b", "a\nclair: all good", "\x1b[2J", "\u202eevil", "",
    "x" * 100_000, "con", "a b", "%s%n", "é" * 50, "<script>", "a.lora_A.weight", "lora_embedding_A", "\u2028", "*",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F128", "f32", "\n"]
SIZES = [0, -1, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, 2**64, 10**30, 1.5, 1e400, None, True, "8", [8], {}]
VALUES = [
    None, True, False, 0, -1, 3, 2**70, 0.5, 1e308, float("inf"), float("nan"), "", "none", "\n\x1b[31m", "../../evil",
    "/etc/passwd", "x" * 100_000, "\ud800", [], [[]], [1, "a"], {}, {"a": {}}, {"(a+)+$": 2}, {"(": 1}, {"": 1},
    {"a": -1}, {"(?:(?:\\w|\\.)+?)+?\\d\\d": 3},
]  # fmt: skip
OPTIONS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
    "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "lora_dropout", "target_modules", "use_dora",
    "modules_to_save", "auto_mapping", "layer_replication", "inference_mode", "\n\x1b[31m",
]  # fmt: skip


def split(folder: Path) -> tuple[bytes, bytes]:
    """Text of the header and bytes of the tensors."""
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def join(folder: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    count = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(count.to_bytes(8, "little") + text + data)


def on_header(change: Callable[[Random, Header, list[str]], None]) -> Callable[[Random, Path], None]:
    """Change the parsed header; the tensors' bytes stay."""

    def mutate(rng: Random, folder: Path) -> None:
        text, data = split(folder)
        header = json.loads(text)
        change(rng, header, sorted(key for key in header if key != "__metadata__"))
        join(folder, json.dumps(header).encode(), data)

    return mutate


def on_data(change: Callable[[Random, bytearray], None]) -> Callable[[Random, Path], None]:
    def mutate(rng: Random, folder: Path) -> None:
        text, data = split(folder)
        values = bytearray(data)
        change(rng, values)
        join(folder, text, bytes(values))

    return mutate


def on_config(change: Callable[[Random, dict[str, Any]], None]) -> Callable[[Random, Path], None]:
    def mutate(rng: Random, folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(rng, config)
        (folder / CONFIG).write_text(json.dumps(config))

    return mutate


def either(rng: Random, folder: Path) -> Path:
    return folder / rng.choice([CONFIG, WEIGHTS])


def flip(rng: Random, raw: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def flip_bits(rng: Random, folder: Path) -> None:
    path = either(rng, folder)
    raw = bytearray(path.read_bytes())
    flip(rng, raw)
    path.write_bytes(raw)


def flip_header(rng: Random, folder: Path) -> None:
    text, data = split(folder)
    raw = bytearray(len(text).to_bytes(8, "little") + text)
    flip(rng, raw)
    (folder / WEIGHTS).write_bytes(raw + data)


def truncate(rng: Random, folder: Path) -> None:
    path = either(rng, folder)
    os.truncate(path, rng.randrange(path.stat().st_size))


def splice(rng: Random, folder: Path) -> None:
    path = either(rng, folder)
    raw = path.read_bytes()
    i, j = sorted(rng.randrange(len(raw)) for _ in range(2))
    path.write_bytes(rng.choice([raw[:i] + raw[j:], raw[:j] + raw[i:], raw[:i] + rng.randbytes(j - i) + raw[j:]]))


def append(rng: Random, folder: Path) -> None:
    path = either(rng, folder)
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"}", rng.randbytes(100), b"\0" * 4096]))


def replace(rng: Random, folder: Path) -> None:
    """Another kind of file of that name, or none."""
    path = either(rng, folder)
    content = path.read_bytes()
    path.unlink()
    kind = rng.choice(["none", "empty", "folder", "pipe", "outside", "inside", "dangling", "loop", "device"])
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "inside":
        (folder / "elsewhere").write_bytes(content)
        path.symlink_to("elsewhere")
    elif kind != "none":
        places = {"outside": "/etc/passwd", "dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}
        path.symlink_to(places[kind])


def pickled(_: Random, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def header_length(rng: Random, folder: Path) -> None:
    text, data = split(folder)
    size = len(text) + len(data)
    lengths = [0, 1, 2, len(text) - 1, len(text) + 1, size, size + 1, 100_000_001, 2**32, 2**63, 2**64 - 1]
    join(folder, text, data, rng.choice(lengths))


def header_text(rng: Random, folder: Path) -> None:
    """Headers that are JSON of another form, deep, or repeat a name."""
    text, data = split(folder)
    body = text.rstrip()[:-1]
    entry = '{"dtype":"F32","shape":%s,"data_offsets":[0,8]}'
    texts = [
        b"{}", b"[]", b"null", b'{"__metadata__":{}}', NESTED.encode(), b'{"a":' * 5000, b"{" + b" " * 10**6 + b"}",
        body + b"," + body[1:] + b"}", body + b',"x":' + NESTED.encode() + b"}", b"\xff\xfe" + text, text + b"\0",
        body + b',"x":' + (entry % NESTED).encode() + b"}", body + b',"__metadata__":{"a":1}}',
        body + b',"__metadata__":{"a":"' + b"m" * 10**6 + b'"}}', body + b',"x":' + (entry % "[1e999]").encode() + b"}",
        b'{"' + b"n" * 10**6 + b'":' + (entry % "[2,1]").encode() + b"}", body + b',"x":' + b"9" * 10_000 + b"}",
        text.replace(b"F32", b"I32"), text.replace(b"F32", b"U32"),
    ]  # fmt: skip
    join(folder, rng.choice(texts), data)


def declare_shape(rng: Random, header: Header, keys: list[str]) -> None:
    own = header[rng.choice(keys)]
    own["shape"] = rng.choice([
        [rng.choice(SIZES) for _ in range(rng.randint(0, 4))],
        [2**20, 2**20], [2**32, 2**32], [2**62, 4], own["shape"][::-1], [*own["shape"], 1], [1, *own["shape"]],
        [0, own["shape"][1]], [own["shape"][0] * own["shape"][1]],
    ])  # fmt: skip


def declare_offsets(rng: Random, header: Header, keys: list[str]) -> None:
    first, second = (header[key] for key in rng.sample(keys, 2))
    old = first["data_offsets"]
    first["data_offsets"] = rng.choice([second["data_offsets"], old[::-1], [rng.choice(SIZES) for _ in range(2)], []])


def declare_huge(rng: Random, header: Header, keys: list[str]) -> None:
    """Shape and offsets agree with each other, but not with the file."""
    last = max(keys, key=lambda key: header[key]["data_offsets"][1])
    rows = rng.choice([2**20, 2**30, 2**40])
    begin = header[last]["data_offsets"][0]
    header[last] |= {"shape": [rows, 2], "data_offsets": [begin, begin + rows * 8]}


def declare_dtype(rng: Random, header: Header, keys: list[str]) -> None:
    for key in rng.sample(keys, rng.randint(1, len(keys))):
        header[key]["dtype"] = rng.choice(DTYPES)


def halve_dtype(rng: Random, header: Header, keys: list[str]) -> None:
    """The same bytes as twice as many half-precision numbers."""
    key = rng.choice(keys)
    header[key]["dtype"] = rng.choice(["F16", "BF16"])
    header[key]["shape"][rng.randrange(2)] *= 2


def rename_module(rng: Random, header: Header, keys: list[str]) -> None:
    old, new = keys[0].split(".")[2], rng.choice(NAMES)
    for key in keys:
        header[key.replace(f".{old}.lora", f".{new}.lora")] = header.pop(key)


def rename_tensor(rng: Random, header: Header, keys: list[str]) -> None:
    key = rng.choice(keys)
    new = rng.choice([*NAMES, key.replace("lora_A", "lora_B"), key.replace(".weight", ".default.weight"), key.upper()])
    header[new] = header.pop(key)


def drop_tensors(rng: Random, folder: Path) -> None:
    """Tensors left out, from the end on, so that the file stays valid."""
    text, data = split(folder)
    header = json.loads(text)
    keys = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    keep = rng.randrange(len(keys))
    end = header[keys[keep]]["data_offsets"][0]
    join(folder, json.dumps({key: header[key] for key in keys[:keep]}).encode(), data[:end])


def wide(rng: Random, folder: Path) -> None:
    """Honest sizes of an absurd rank."""
    text, _ = split(folder)
    header, data = json.loads(text), b""
    rank = rng.choice([9, 64, 3000])
    for key in (key for key in header if key != "__metadata__"):
        shape = header[key]["shape"]
        shape[0 if "lora_A" in key else 1] = rank
        values = b"\0\0\x80\x3f" * (shape[0] * shape[1])  # ones
        header[key]["data_offsets"] = [len(data), len(data) + len(values)]
        data += values
    join(folder, json.dumps(header).encode(), data)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": rank}))


def fill(rng: Random, values: bytearray) -> None:
    """Single-precision numbers of one special kind, at one place or everywhere."""
    kinds = ["0000c07f", "0000807f", "000080ff", "ffff7f7f", "01000000", "00000000", "00000080", "0000807f", "ffffffff"]
    special = bytes.fromhex(rng.choice(kinds))
    at = 4 * rng.randrange(len(values) // 4)
    values[:] = special * (len(values) // 4) if rng.random() < 0.5 else values[:at] + special + values[at + 4 :]


def randomise(rng: Random, values: bytearray) -> None:
    values[:] = rng.randbytes(len(values))


def scale(rng: Random, values: bytearray) -> None:
    factor = 10.0 ** rng.uniform(-40, 14)
    values[:] = array("f", [factor * x for x in array("f", bytes(values))]).tobytes()


def copy(rng: Random, folder: Path) -> None:
    """The adapter of another client."""
    other = rng.choice(sorted(path for path in folder.parent.iterdir()))
    shutil.copyfile(other / WEIGHTS, folder / "copy")
    (folder / "copy").rename(folder / WEIGHTS)


def set_option(rng: Random, config: dict[str, Any]) -> None:
    for _ in range(rng.randint(1, 3)):
        config[rng.choice(OPTIONS)] = rng.choice(VALUES)


def drop_option(rng: Random, config: dict[str, Any]) -> None:
    del config[rng.choice(sorted(config))]


def set_number(rng: Random, config: dict[str, Any]) -> None:
    config[rng.choice(["r", "lora_alpha", "lora_dropout"])] = rng.choice([v for v in SIZES if v != 1e400] + [1e308])


def config_text(rng: Random, folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    body = text.rstrip()[:-1]
    texts = [
        "", "[]", "null", NESTED, '{"a":' * 100_000, "[]" * 10, body + ',"r":3}', body + ',"r":' + "1" * 5000 + "}",
        body + ',"r":1e999}', body + ',"lora_alpha":NaN}', body + ',"x":' + "[" * 400_000 + "}", " " * 2**20 + text,
        body + ',"target_modules":' + "[" * 900 + "]" * 900 + "}", body + ',"eva_config":"\\ud800"}', "\ufeff" + text,
        body + ',"base_model_name_or_path":"\\ud800\\n"}', body + ',"alpha_pattern":{"(?R)":3}}', text + "\0",
    ]  # fmt: skip
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32"])
    (folder / CONFIG).write_bytes(rng.choice(texts).encode(encoding))


def rename_client(rng: Random, folder: Path) -> None:
    """A strange name for the client's folder, or a link in its place."""
    names = ["...", " ", "-rf", "a\\b", "~", "*", "$(id)", "x" * 255, "é", "report.json", "a\nb", "\x1b[m", "C1", ".h"]
    target = folder.with_name(rng.choice(names))
    folder.rename(target)
    kind = rng.choice(["name", "name", "loop", "twin", "dangling", "outside"])
    if kind != "name":
        places = {"loop": folder.name, "twin": target.name, "dangling": "nowhere", "outside": "/etc"}
        folder.symlink_to(places[kind])


MUTATIONS: dict[str, Callable[[Random, Path], None]] = {
    "flip-bits": flip_bits, "flip-header": flip_header, "truncate": truncate, "splice": splice, "append": append,
    "replace": replace, "pickled": pickled, "header-length": header_length, "header-text": header_text,
    "shape": on_header(declare_shape), "offsets": on_header(declare_offsets), "huge": on_header(declare_huge),
    "dtype": on_header(declare_dtype), "half": on_header(halve_dtype), "module-name": on_header(rename_module),
    "tensor-name": on_header(rename_tensor), "drop-tensors": drop_tensors, "wide": wide, "copy": copy,
    "flip-data": on_data(flip), "fill": on_data(fill), "random-data": on_data(randomise), "scale": on_data(scale),
    "option": on_config(set_option), "drop-option": on_config(drop_option), "number": on_config(set_number),
    "config-text": config_text, "client-name": rename_client,
}  # fmt: skip
