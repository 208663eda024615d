"""Base model and clients: many updates judged at once equal peft's own model, folders round-trip, nothing drifts."""

import copy
import json
import os

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.training import save_adapters
from studies.text_copying import base_model as base_module
from studies.text_copying import clients as copying_clients
from studies.text_copying.base_model import BaseConfig, base_model, base_name, build_base, unembedding
from studies.text_copying.clients import (
    Recipe,
    TrainedFederation,
    backdoor_success,
    evaluate,
    evaluate_free_running,
    load_updates,
    target_modules,
    train,
    train_clients,
    updated_logits,
)
from studies.text_copying.dialects import client_batch, make_federation, vocabulary_leverage
from studies.text_copying.task import NO_TARGET, copy_accuracy

LAST = "model.layers.1.self_attn.o_proj"
SEED = 0


@pytest.fixture(scope="module")
def base():
    """The real base model: trained once (about 15 s) and then taken from the project's cache."""
    return base_model()


@pytest.fixture(scope="module")
def federation():
    return make_federation(4, 1, seed=SEED)


@pytest.fixture(scope="module")
def trained(base, federation):
    return train(base, federation.clients, seed=SEED)


@pytest.fixture(scope="module")
def local(base, federation, trained):
    """The clients' own updates as the server gets them."""
    return TrainedFederation(base, federation, trained)


@pytest.fixture(scope="module")
def folders(base, trained, tmp_path_factory):
    return save_adapters(base.model, trained, tmp_path_factory.mktemp("clients"))


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


def test_base_name_changes_with_the_code(monkeypatch):
    before = base_name(BaseConfig())
    monkeypatch.setattr(base_module, "module_digest", lambda *_: "other code")
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


def full_model_update(base, client, recipe):
    """The same training of the last output projection through the whole model, by plain autograd."""
    model = copy.deepcopy(base.model)
    A = nn.init.kaiming_uniform_(torch.empty(recipe.rank, 64), a=5**0.5, generator=derive(SEED, client.name, LAST))
    A, B = A.requires_grad_(), torch.zeros(64, recipe.rank, requires_grad=True)
    module = model.get_submodule(LAST)
    module.register_forward_hook(lambda _, x, out: out + recipe.alpha / recipe.rank * x[0] @ A.T @ B.T)
    draws = derive(SEED, client.name, "training")
    batch = client_batch(client, recipe.sequences, generator=draws, label_noise=recipe.label_noise)
    optimizer = torch.optim.AdamW([A, B], lr=recipe.learning_rate)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
    return (recipe.alpha / recipe.rank * B @ A).detach()


def test_clients_train_like_the_full_model_on_their_targets(base, federation):
    client, recipe = federation.clients[0], Recipe(steps=8)
    (together,) = train(base, [client], seed=SEED, recipe=recipe)
    alone = full_model_update(base, client, recipe)
    assert alone.norm() > 0.3
    # float32; Adam divides by small gradients
    assert (together.updates[LAST].dense() - alone).norm() / alone.norm() < 1e-3


def peft_logits(base, folder, batch):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)).eval()
    with torch.no_grad():
        return model(batch.tokens).logits[batch.targets != NO_TARGET]


@pytest.mark.parametrize("targets", ["last", "output"])
def test_updates_judged_together_equal_pefts_own_models(base, federation, tmp_path, targets):
    clients = federation.clients[:2]
    folders = train_clients(base, clients, tmp_path, seed=SEED, recipe=Recipe(steps=20, targets=targets))
    batch = client_batch(clients[0], 16, generator=derive(SEED, "logits"))
    updates = load_updates(base, folders)
    assert set(updates) == set(target_modules(base, targets))
    logits = updated_logits(base, batch, updates)
    for own, folder in zip(logits, folders, strict=True):
        torch.testing.assert_close(own, peft_logits(base, folder, batch), atol=1e-4, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_cached_prefix_and_whole_model_agree_on_any_update(base, federation):
    batch = client_batch(federation.clients[0], 16, generator=derive(SEED, "logits"))
    update = torch.randn(3, 64, 64, generator=derive(0, "dense"))
    others = torch.zeros(3, 64, 64)  # one more module: now the whole model is run
    whole = updated_logits(base, batch, {LAST: update, "model.layers.0.self_attn.o_proj": others})
    torch.testing.assert_close(updated_logits(base, batch, {LAST: update}), whole, atol=1e-4, rtol=1e-5)


def test_targets_are_the_matrices_that_write_to_the_residual_stream(base):
    assert target_modules(base, "last") == [LAST]
    names = [f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ("self_attn.o_proj", "mlp.down_proj")]
    assert target_modules(base, "output") == names
    assert all(base.model.get_submodule(name).out_features == 64 for name in names)


def test_folders_are_peft_adapters_that_name_no_path(base, federation, folders, local):
    loaded = load_updates(base, folders)[LAST]
    torch.testing.assert_close(loaded.double(), local.dense[LAST], atol=1e-6, rtol=1e-5)
    for client, folder in zip(federation.clients, folders, strict=True):
        assert folder.name == client.name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base.name and "/" not in base.name


def test_a_foreign_folder_is_refused(base, federation, tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="'notes'"):
        train_clients(base, federation.clients[:1], tmp_path, seed=SEED, recipe=Recipe(steps=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]


def test_a_client_does_not_depend_on_the_others(base, federation, local):
    torch.manual_seed(5)  # nor on the global generator
    (alone,) = train(base, federation.clients[2:3], seed=SEED)
    torch.testing.assert_close(alone.updates[LAST].dense().double(), local.dense[LAST][2], atol=1e-3, rtol=1e-2)


def test_full_matrix_updates_are_not_confined_to_the_adapters_rank(base, federation):
    run = TrainedFederation(base, federation, train(base, federation.clients, seed=SEED, recipe=Recipe(rank=None)))
    values = torch.linalg.svdvals(run.updates[LAST][0])
    assert values[20] > 1e-3 * values[0]


def test_adapters_multiplied_out_keep_their_rank(trained):
    """In float32 rounding would fill every direction, and what depends on the rank of an update would go wrong."""
    updates = [client.updates[LAST] for client in trained]
    values = torch.linalg.svdvals(as_dense({LAST: updates})[LAST])
    assert (values[:, 8:] < 1e-12 * values[:, :1]).all() and (values[:, 7] > 1e-3 * values[:, 0]).all()


def test_a_client_that_diverges_is_an_error_that_names_it(base, federation):
    with pytest.raises(RuntimeError, match="'client-0[01]' diverged at step"):
        train(base, federation.clients[:2], seed=SEED, recipe=Recipe(steps=30, learning_rate=1e6))


def test_held_out_sequences_decide_when_to_stop(base, federation):
    client, recipe = federation.clients[0], Recipe(held_out=8, label_noise=0.3, steps=120)
    data = copying_clients.client_data(client, recipe, seed=SEED)
    assert len(data.validation) == 8 and len(data.examples) == recipe.sequences - 8
    everything = copying_clients.client_data(client, Recipe(label_noise=0.3), seed=SEED)
    together = [*data.validation, *data.examples]
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(together, everything.examples, strict=True))
    (stopped,) = train(base, [client], seed=SEED, recipe=recipe)
    assert 0 < stopped.best_step < recipe.steps  # at 30 % label noise it overfits before


def test_updates_judged_one_by_one_get_the_same_accuracy(base, federation, local):
    client = federation.clients[0]
    together = evaluate(base, client, local.dense, seed=SEED)
    for k, accuracy in enumerate(together):
        (alone,) = evaluate(base, client, {LAST: local.dense[LAST][k : k + 1]}, seed=SEED)
        assert alone == accuracy
    assert len(set(together)) > 1
    batch = client_batch(client, 200, generator=derive(SEED, client.name, "evaluation"))
    with torch.no_grad():
        plain = copy_accuracy(base.model(batch.tokens).logits, batch.targets, client.dialect.symbols)
    assert evaluate(base, client, {LAST: torch.zeros(1, 64, 64)}, seed=SEED) == [plain]


def test_clients_learn_their_dialect_and_averaging_unlearns_it(base, federation, local):
    k = federation.benign.tolist().index(True)
    client, own = federation.clients[k], local.dense[LAST]
    stack = {LAST: torch.stack([torch.zeros(64, 64).double(), own[k], own.mean(dim=0)])}
    before, after, averaged = evaluate(base, client, stack, seed=SEED)
    assert before.on_symbols < 0.4 and before.off_symbols > 0.95
    assert after.on_symbols > before.on_symbols + 0.4 and after.overall > before.overall
    assert averaged.overall < after.overall
    free = evaluate_free_running(base, client, stack, seed=SEED)
    assert free[0] < free[1] <= 1


def test_a_backdoor_is_learnt_by_those_taught_it_only(base):
    federation = make_federation(4, 2, seed=SEED, kind="backdoor")
    run = TrainedFederation(base, federation, train(base, federation.clients, seed=SEED))
    client = next(client for client in federation.clients if not client.contaminated)
    success = torch.tensor(backdoor_success(base, client, federation.backdoor, run.dense, seed=SEED))
    assert success[~federation.benign].min() > 0.4 and success[federation.benign].max() < 0.1


def test_contaminated_updates_are_as_large_as_benign_ones_where_only_symbols_differ(base):
    for kind in ("wrong_symbols", "shared_wrong_symbols", "backdoor"):
        federation = make_federation(12, 6, seed=SEED, kind=kind)
        run = TrainedFederation(base, federation, train(base, federation.clients, seed=SEED))
        norms = torch.linalg.matrix_norm(run.dense[LAST])
        ratio = norms[~federation.benign].mean() / norms[federation.benign].mean()
        assert 0.85 < ratio < 1.15  # norms of benign clients vary by 6 %


def test_the_benign_subspace_lights_up_the_dialects_symbols(base):
    federation = make_federation(8, 0, seed=SEED)
    updates = TrainedFederation(base, federation, train(base, federation.clients, seed=SEED)).dense[LAST]
    blocks = torch.cat(list(updates - updates.mean(dim=0)), dim=1)  # (p, K*q)
    basis = torch.linalg.svd(blocks, full_matrices=False).U[:, :4]
    leverage = vocabulary_leverage(basis, unembedding(base))
    assert set(leverage.topk(5).indices.tolist()) == set(federation.symbols.tolist())
