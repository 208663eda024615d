"""Base model and adapters: the cached prefix equals the full model, folders round-trip, nothing drifts."""

import copy
import json
import os

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from clairlib import base as base_module
from clairlib import copying_clients
from clairlib.base import BaseConfig, base_model, base_name, build_base, unembedding
from clairlib.copying import NO_TARGET, copy_accuracy
from clairlib.copying_clients import Recipe, adapted_module, adapter_update, evaluate_update, run_prefix, run_suffix
from clairlib.dialects import client_batch, make_federation, vocabulary_leverage
from clairlib.seeds import derive

SEED = 0


@pytest.fixture(scope="module")
def base():
    """The real base model: trained once (about 15 s) and then taken from the project's cache."""
    return base_model()


@pytest.fixture(scope="module")
def federation():
    return make_federation(4, 1, seed=SEED)


@pytest.fixture(scope="module")
def folders(base, federation, tmp_path_factory):
    return copying_clients.train_clients(base, federation.clients, tmp_path_factory.mktemp("clients"), seed=SEED)


@pytest.fixture
def quick(monkeypatch):
    """A base model that trains for one step, and how often it was trained."""
    trained = []
    real = base_module.train_base
    monkeypatch.setattr(base_module, "train_base", lambda config: trained.append(config) or real(config))
    return BaseConfig(target=-1.0, check_every=1, batch=2, hidden=16), trained


def test_base_copies_in_and_out_of_distribution(base):
    inside, outside = base_module.copying_accuracies(base.model, seed=99)  # sequences it was not judged by
    assert inside > 0.95 and outside > 0.95
    assert not any(weight.requires_grad for weight in base.model.parameters())


def test_base_comes_from_the_cache_until_something_changes(quick, tmp_path):
    config, trained = quick
    first, again = base_model(config, cache=tmp_path), base_model(config, cache=tmp_path)
    assert len(trained) == 1 and first.name == again.name and first.steps == again.steps == 1
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    base_model(BaseConfig(**{**vars(config), "seed": 1}), cache=tmp_path)
    assert len(trained) == 2


def test_base_name_changes_with_the_code(monkeypatch, tmp_path):
    source = tmp_path / "copying.py"
    source.write_text("other code")
    before = base_name(BaseConfig())
    monkeypatch.setattr(base_module.copying, "__file__", str(source))
    assert base_name(BaseConfig()) != before


def test_interrupted_training_leaves_no_cache_entry(quick, tmp_path, monkeypatch):
    config, trained = quick

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        base_model(config, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert base_model(config, cache=tmp_path).steps == 1


def test_missed_target_is_an_error(tmp_path):
    config = BaseConfig(max_steps=2, check_every=1, batch=2, hidden=16)
    with pytest.raises(RuntimeError, match="after 2 steps"):
        base_model(config, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one, state = build_base(BaseConfig()), torch.get_rng_state()
    torch.manual_seed(2)
    other = build_base(BaseConfig())
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # building it did not move the global generator
    assert not torch.equal(one.lm_head.weight, build_base(BaseConfig(seed=1)).lm_head.weight)


def full_model_adapter(base, client, recipe, steps):
    """The same training through the whole model, without a cached prefix."""
    model = copying_clients.add_adapter(base, recipe, generator=derive(SEED, client.name, "adapter"))
    draws = derive(SEED, client.name, "training")
    batch = client_batch(client, recipe.sequences, generator=draws, label_noise=recipe.label_noise)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=recipe.learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
    return model


def test_cached_prefix_trains_like_the_full_model(base, federation):
    client, recipe = federation.clients[0], Recipe(steps=8)
    cached = adapter_update(copying_clients.train_client(base, client, seed=SEED, recipe=recipe))
    full = adapter_update(full_model_adapter(base, client, recipe, steps=8))
    assert full.norm() > 0.3
    assert (cached - full).norm() / full.norm() < 1e-3  # float32; Adam divides by small gradients


def test_suffix_gives_the_full_models_logits(base, federation, folders):
    batch = client_batch(federation.clients[0], 16, generator=derive(SEED, "logits"))
    for update in (None, folders[0], torch.randn(64, 64, generator=derive(0, "dense"))):
        model = copying_clients.updated_model(base, update)
        with torch.no_grad():
            full = model(batch.tokens).logits[batch.targets != NO_TARGET]
            prefix = run_prefix(model, batch)
            torch.testing.assert_close(run_suffix(model, prefix), full, atol=1e-4, rtol=1e-5)
        accuracy = copy_accuracy(full, prefix.targets).overall
        assert copy_accuracy(run_suffix(model, prefix), prefix.targets).overall == accuracy


def test_only_the_last_output_projection_is_adapted(base, federation, folders):
    model = copying_clients.add_adapter(base, Recipe(), generator=derive(0, "A"))
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    stem = "base_model.model.model.layers.1.self_attn.o_proj"
    assert names == {f"{stem}.lora_{factor}.default.weight" for factor in "AB"}
    assert adapted_module(model).lora_A["default"].weight.shape == (8, 64)


def test_folders_are_peft_adapters_that_name_no_path(base, federation, folders):
    for client, folder in zip(federation.clients, folders, strict=True):
        assert folder.name == client.name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base.name and "/" not in base.name
        trained = adapter_update(copying_clients.train_client(base, client, seed=SEED))
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder))
        torch.testing.assert_close(adapter_update(loaded), trained, atol=0, rtol=0)


def test_an_adapter_folder_and_its_dense_update_are_one(base, federation, folders):
    client = federation.clients[0]
    dense = adapter_update(copying_clients.updated_model(base, folders[0]))
    by_folder = evaluate_update(base, folders[0], client, seed=SEED)
    assert by_folder == evaluate_update(base, dense, client, seed=SEED)
    assert by_folder != evaluate_update(base, None, client, seed=SEED)


def test_a_foreign_folder_is_refused(base, federation, tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="'notes'"):
        copying_clients.train_clients(base, federation.clients[:1], tmp_path, seed=SEED, recipe=Recipe(steps=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]


def test_a_client_does_not_depend_on_the_others(base, federation, folders, tmp_path):
    torch.manual_seed(5)  # nor on the global generator
    (alone,) = copying_clients.train_clients(base, federation.clients[2:3], tmp_path, seed=SEED)
    one, other = (adapter_update(copying_clients.updated_model(base, f)) for f in (alone, folders[2]))
    assert torch.equal(one, other)


def test_clients_learn_their_dialect_and_averaging_unlearns_it(base, federation, folders):
    client = next(c for c in federation.clients if not c.contaminated)
    own = folders[federation.clients.index(client)]
    before, after = (evaluate_update(base, u, client, seed=SEED) for u in (None, own))
    assert before.on_symbols < 0.4 and before.off_symbols > 0.95
    assert after.on_symbols > before.on_symbols + 0.4 and after.overall > before.overall
    everybody = torch.stack([adapter_update(copying_clients.updated_model(base, f)) for f in folders]).mean(dim=0)
    assert evaluate_update(base, everybody, client, seed=SEED).overall < after.overall
    free = copying_clients.evaluate_free_running(base, own, client, seed=SEED, count=60)
    assert copying_clients.evaluate_free_running(base, None, client, seed=SEED, count=60) < free <= 1


def test_the_benign_subspace_lights_up_the_dialects_symbols(base):
    federation = make_federation(8, 0, seed=SEED)
    models = [copying_clients.train_client(base, client, seed=SEED) for client in federation.clients]
    updates = torch.stack([adapter_update(model) for model in models])
    blocks = torch.cat(list(updates - updates.mean(dim=0)), dim=1)  # (p, K*q)
    basis = torch.linalg.svd(blocks, full_matrices=False).U[:, :4]
    leverage = vocabulary_leverage(basis, unembedding(base))
    assert set(leverage.topk(5).indices.tolist()) == set(federation.symbols.tolist())
