"""Where models are cut, that wrong cuts are not taken, and the cache of what the frozen part hands on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clairlib.training import ClientData, Schedule, train_adapters
from clairlib.training import activations as activations_module
from clairlib.training.frozen_prefix import Cut
from clairlib.training.preparation import memory_needed, prepare
from clairlib.training.probe import Probe
from clairlib.training.suffix import shared_copy
from clairlib.training.trainer import Run
from helpers.sequential import tiny_bert, tiny_llama, tiny_opt, tokens_of
from helpers.training_clients import CLASSIFIERS, CLIENTS, FULL, PARTS, SEED, assert_as_alone

OPTIONS = {"device": "cpu", "autocast": None, "group_tokens": 4096, "cache_bytes": 2**30}
LAST = ["layers.2.self_attn.o_proj"]


def cut_of(model, targets, clients=CLIENTS):
    shortcuts = prepare(model, clients, targets, FULL, **OPTIONS).plan.shortcuts
    assert shortcuts.select and shortcuts.fused
    return shortcuts.cut


def test_a_cut_lies_right_before_the_first_adapted_module():
    model = tiny_llama()
    last = "model.layers.2"
    norm, after = f"{last}.input_layernorm", f"{last}.post_attention_layernorm"
    attention, mlp = f"{last}.self_attn", f"{last}.mlp"
    output = Cut("model.layers", 2, f"{attention}.o_proj", attention, skipped=(norm,), single=True)
    assert cut_of(model, LAST) == output == cut_of(model, [*LAST, "layers.2.mlp.down_proj"])
    down = Cut("model.layers", 2, f"{mlp}.down_proj", mlp, (attention,), (norm, after), single=True)
    assert cut_of(model, ["layers.2.mlp.down_proj"]) == down
    first = cut_of(model, ["o_proj"])
    assert (first.index, first.whole, first.single) == (0, "model.layers.0.self_attn", False)
    assert cut_of(model, ["layers.2.self_attn.q_proj"]) == Cut("model.layers", 2, f"{attention}.q_proj", cached=(norm,))
    assert cut_of(model, ["lm_head"]) is None


def test_an_encoder_is_cut_too():
    block = "bert.encoder.layer.1"
    dense = Cut("bert.encoder.layer", 1, f"{block}.output.dense", None, (f"{block}.attention", f"{block}.intermediate"))
    assert cut_of(tiny_bert(), ["layer.1.output.dense"], CLASSIFIERS) == dataclasses.replace(dense, entry=False)


def test_what_is_below_the_cut_runs_once_an_example(monkeypatch):
    model, calls = tiny_llama(), []
    attend = type(model.model.layers[0].self_attn).forward

    def counted(self, hidden_states, *args, **kwargs):
        calls.append((self.layer_idx, hidden_states.shape[0]))
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", counted)
    prepared = prepare(model, CLIENTS, LAST, FULL, **OPTIONS)
    calls.clear()
    run = Run(prepared, seed=SEED)
    assert [layer for layer, _ in calls] == [0, 1, 2] * (len(calls) // 3)
    assert sum(count for layer, count in calls if layer == 0) == sum(len(c.examples) for c in CLIENTS)
    calls.clear()
    run.step()
    assert calls == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": 2},  # passes by the adapters of block 1
        {"single": True},  # attention looks at other positions
        {"whole": "model.layers.1.self_attn", "cached": (), "entry": True},  # loses q's influence
        {"cached": (), "skipped": ("model.layers.1.input_layernorm",)},  # k and v read another thing
    ],
    ids=["block", "single", "whole", "skipped"],
)
def test_a_wrong_cut_does_not_hold(wrong):
    model = tiny_llama()
    targets = [f"model.layers.{j}.self_attn.{name}" for j in (1, 2) for name in ("q_proj", "o_proj")]
    probe = Probe(shared_copy(model, "cpu"), targets, shift=True, classes=False, pad=0, device="cpu")
    right = probe.plan(None).shortcuts
    assert probe.holds(right)
    assert not probe.holds(dataclasses.replace(right, cut=dataclasses.replace(right.cut, **wrong)))


def test_a_weaker_cut_is_taken_where_the_deepest_is_wrong(monkeypatch):
    """The model is run otherwise than its modules say: attention adds its own input to the projection's output."""
    model = tiny_llama()
    attend = type(model.model.layers[0].self_attn).forward

    def odd(self, hidden_states, *args, **kwargs):
        out, weights = attend(self, hidden_states, *args, **kwargs)
        return out.add_(hidden_states) if not torch.is_grad_enabled() else out + hidden_states, weights

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", odd)
    cut = prepare(model, CLIENTS, LAST, FULL, **OPTIONS).plan.shortcuts.cut
    assert cut is not None and cut.whole != "model.layers.2.self_attn" and cut.index == 2
    assert_as_alone(model, CLIENTS, LAST, FULL, train_adapters(model, CLIENTS, LAST, FULL, seed=SEED))


def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(monkeypatch):
    model = tiny_llama()
    forward = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: forward(self, x - x.mean(0, keepdim=True)))
    with pytest.raises(ValueError, match="treats examples of one batch together"):
        train_adapters(model, CLIENTS, ["o_proj"], FULL, seed=SEED)


def test_other_kinds_of_linear_modules_are_refused():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="'transformer.h.0.attn.c_attn' is a Conv1D; only nn.Linear"):
        train_adapters(model, CLIENTS, ["c_attn"], FULL, seed=SEED)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt], ids=["llama", "opt"])
def test_activations_on_disk_give_the_same_and_are_removed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(activations_module.tempfile, "tempdir", str(tmp_path))
    folders = []
    close = activations_module.Activations.close

    def watched(self):
        folders.append([path.name for path in tmp_path.rglob("*") if path.is_file()])
        close(self)

    monkeypatch.setattr(activations_module.Activations, "close", watched)
    model, targets = make(), ["layers.1.self_attn.out_proj", "layers.1.self_attn.o_proj"]
    on_disk = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED, cache_bytes=100)
    assert len(folders[-1]) == 2 and list(tmp_path.iterdir()) == []
    in_memory = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED)
    for one, other in zip(on_disk, in_memory, strict=True):
        assert torch.equal(one.losses, other.losses)
        name = next(iter(one.updates))
        assert torch.equal(one.updates[name].B, other.updates[name].B)


def test_a_full_disk_is_said_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(activations_module.tempfile, "tempdir", str(tmp_path))
    usage = activations_module.shutil.disk_usage(Path("."))
    monkeypatch.setattr(activations_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="activations need .* bytes, .* has 1.00e\\+03 free"):
        train_adapters(tiny_llama(), CLIENTS, LAST, FULL, seed=SEED, cache_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_stated_as_it_is_taken():
    model = tiny_llama(torch.float32, hidden_size=32, vocab_size=200)
    clients = [ClientData(f"c{k}", tokens_of(20, seed=k, shortest=30, longest=32)) for k in range(4)]
    schedule, validating = Schedule(steps=2, batch=10), [dataclasses.replace(clients[0], validation=tokens_of(2))]
    stated = memory_needed(model, clients, ["o_proj", "up_proj"], schedule)
    run = Run(prepare(model, clients, ["o_proj", "up_proj"], schedule, **OPTIONS), seed=SEED)
    assert stated.cache == sum(own.numel() * own.element_size() for own in run.activations.buffers.values())
    ((group, values),) = run.groups()
    kept, known = {}, {own.untyped_storage().data_ptr() for own in (*run.suffix.model.parameters(), *values.values())}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = run.stacks.load(run.suffix.layers, group.positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = run.suffix.losses(group, values)
    measured = sum(size for pointer, size in kept.items() if pointer not in known)
    assert losses.isfinite().all() and measured <= stated.group <= 5 * measured
    run.stacks.accumulate(group.positions, [torch.ones_like(leaf) for leaf in leaves])
    run.stacks.optimizer.step()
    moments = [v for state in run.stacks.optimizer.state.values() for v in state.values() if v.dim()]
    held = [*run.stacks.flat, *(own.grad for own in run.stacks.flat), *moments]
    assert stated.adapters == sum(own.numel() * own.element_size() for own in held)
    assert str(stated).count("\n") == 0 and stated.total == stated.adapters + stated.cache + stated.group
    more = memory_needed(model, validating, ["o_proj", "up_proj"], schedule)
    assert more.adapters == stated.adapters / 4 * 5 / 4  # one client of four, and its best weights


def test_what_is_on_disk_is_not_counted_as_memory():
    stated = memory_needed(tiny_llama(), CLIENTS, LAST, FULL, cache_bytes=100)
    assert stated.on_disk and stated.cache > 100 and stated.total == stated.adapters + stated.group


def test_only_causal_models_go_without_an_attention_mask():
    for make, clients, targets in ((tiny_llama, CLIENTS, LAST), (tiny_bert, CLASSIFIERS, ["query"])):
        shortcuts = prepare(make(), clients, targets, FULL, **OPTIONS).plan.shortcuts
        assert shortcuts.unmasked == (make is tiny_llama)


def test_the_examples_own_masks_are_kept():
    hidden = [dict(e, attention_mask=(e["input_ids"] % 3 > 0).long().index_fill(0, torch.tensor([0]), 1)) for e in
              CLIENTS[0].examples]  # fmt: skip
    clients = [dataclasses.replace(CLIENTS[0], examples=hidden), CLIENTS[1]]
    model, targets = tiny_llama(), ["q_proj", "o_proj"]
    trained = train_adapters(model, clients, targets, PARTS, seed=SEED)
    assert_as_alone(model, clients, targets, PARTS, trained)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_linear_module_that_computes_otherwise_is_refused():
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.__class__ = Doubled
    with pytest.raises(ValueError, match="'model.layers.1.self_attn.o_proj', a Doubled, does not multiply by its"):
        train_adapters(model, CLIENTS, ["o_proj"], FULL, seed=SEED)
