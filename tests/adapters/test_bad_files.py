"""A bad file of any client is refused by ``clair align`` in one line that names client and culprit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.adapter_clients import (
    CONFIG,
    KEY,
    O_PROJ,
    WEIGHTS,
    edit,
    edit_tensors,
    put,
    refused,
    scaled,
    truncate_file,
)


def nan_at(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][1, 2] = value

    return change


def drop(text: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if text in key]:
            del tensors[key]

    return change


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
    "overflow": (lambda c: edit_tensors(c / WEIGHTS, scaled(1e200)), ["module", "too large"]),
    "overflow-single": (lambda c: edit_tensors(c / WEIGHTS, scaled(1e20, torch.float32)), ["module", "too large"]),
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
    "patterns-too-many": (
        lambda c: edit(c / CONFIG, rank_pattern={f"x{i}": 1 for i in range(1025)}),
        ["rank_pattern", "at most 1024"],
    ),
    "pattern-too-long": (lambda c: edit(c / CONFIG, alpha_pattern={"x|" * 513: 1}), ["alpha_pattern", "at most"]),
    "pattern-recursive": (lambda c: edit(c / CONFIG, alpha_pattern={"(?R)": 3}), ["(?R)", "cannot be matched"]),
    "patterns-slow-together": (  # each takes a tenth of a second
        lambda c: edit(c / CONFIG, alpha_pattern={rf"(?:[\w.]+?){{6}}[zZ](?#{i})": 1 for i in range(60)}),
        [CONFIG, "too long"],
    ),
    "dora": (lambda c: edit(c / CONFIG, use_dora=True), ["use_dora"]),
    "layer-replication": (lambda c: edit(c / CONFIG, layer_replication=[[0, 2], [1, 2]]), ["layer_replication"]),
    "velora": (lambda c: edit(c / CONFIG, velora_config={"rank": 2}), ["velora_config"]),
    "unknown-variant": (lambda c: edit(c / CONFIG, use_newlora={"beta": 1}), ["use_newlora"]),
    "unknown-nan": (lambda c: edit(c / CONFIG, noise=float("nan")), ["noise"]),
    "unknown-start": (lambda c: edit(c / CONFIG, init_lora_weights="newinit"), ["newinit"]),
    "dropout-nan": (lambda c: edit(c / CONFIG, lora_dropout=float("nan")), ["lora_dropout"]),
    "task-unknown": (lambda c: edit(c / CONFIG, task_type="EVIL"), ["task_type", "EVIL"]),
    "fan-no-bool": (lambda c: edit(c / CONFIG, fan_in_fan_out="yes"), ["fan_in_fan_out"]),
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
