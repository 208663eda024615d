"""Clients trained at once end where peft and torch.optim.AdamW bring each of them by itself."""

import dataclasses

import peft
import pytest
import torch

from clairlib.training import ClientData, Schedule, save_adapters, train_adapters
from clairlib.training import trainer as training
from helpers.sequential import (
    factors_of,
    summed_loss,
    tiny_bert,
    tiny_llama,
    tiny_opt,
    tokens_of,
    train_alone,
)
from helpers.training_clients import CLASSIFIERS, CLIENTS, EXACT, FULL, PARTS, SEED, SINGLE, assert_as_alone


@pytest.mark.parametrize("schedule", [FULL, PARTS], ids=["full", "parts"])
@pytest.mark.parametrize(
    "targets",
    [["layers.2.self_attn.o_proj"], ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"], ["lm_head"]],
    ids=["last", "output", "qkv", "head"],
)
def test_llama_trains_as_each_client_alone(targets, schedule):
    model = tiny_llama()
    trained = train_adapters(model, CLIENTS, targets, schedule, seed=SEED, group_tokens=60)
    assert_as_alone(model, CLIENTS, targets, schedule, trained)
    assert [len(own.losses) for own in trained] == [schedule.steps_of(client) for client in CLIENTS]


@pytest.mark.parametrize("targets", [["out_proj", "fc2"], ["layers.1.fc2"]], ids=["output", "last"])
def test_a_model_with_learned_positions_trains_as_each_client_alone(targets):
    model = tiny_opt()
    trained = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED)
    assert_as_alone(model, CLIENTS, targets, PARTS, trained)


@pytest.mark.parametrize("targets", [["query", "value"], ["layer.1.output.dense"]], ids=["attention", "last"])
def test_a_classifier_trains_as_each_client_alone(targets):
    model = tiny_bert()
    trained = train_adapters(model, CLASSIFIERS, targets, PARTS, seed=SEED)
    assert_as_alone(model, CLASSIFIERS, targets, PARTS, trained)


@pytest.mark.parametrize("targets", [["layers.2.self_attn.o_proj"], ["q_proj", "down_proj"]], ids=["last", "several"])
def test_float32_agrees_within_its_rounding(targets):
    model = tiny_llama(torch.float32)
    trained = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED)
    assert trained[0].updates[next(iter(trained[0].updates))].B.dtype == torch.float32
    assert_as_alone(model, CLIENTS, targets, PARTS, trained, SINGLE)


def test_a_client_does_not_depend_on_its_neighbours():
    model, targets = tiny_llama(), ["o_proj"]
    together = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED)
    (alone,) = train_adapters(model, CLIENTS[1:2], targets, PARTS, seed=SEED)
    for name, update in alone.updates.items():
        torch.testing.assert_close(together[1].updates[name].B, update.B, atol=1e-12, rtol=1e-12)


def test_all_linear_means_what_it_means_to_peft():
    model = tiny_llama()
    (own,) = train_adapters(model, CLIENTS[1:2], "all-linear", Schedule(steps=1), seed=SEED)
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert set(own.updates) == set(factors_of(adapted))


def full_matrix_alone(model, client, name, schedule):
    """Losses and update when the weight itself moves, decaying towards the base."""
    base = model.get_submodule(name).weight.detach().clone()
    delta = torch.zeros_like(base, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    losses = []
    for _ in range(schedule.steps):
        call = lambda **kw: torch.func.functional_call(model, {f"{name}.weight": base + delta}, (), kw)  # noqa: E731
        loss, count = summed_loss(call, client.examples)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item() / count)
    return torch.tensor(losses, dtype=torch.float64), delta.detach()


def test_full_matrix_updates_agree_with_a_plain_loop():
    model, name = tiny_llama().eval(), "model.layers.2.self_attn.o_proj"
    clients = [dataclasses.replace(client, rank=None) for client in CLIENTS]
    trained = train_adapters(model, clients, [name], FULL, seed=SEED)
    for client, own in zip(clients, trained, strict=True):
        losses, delta = full_matrix_alone(model, client, name, FULL)
        torch.testing.assert_close(own.losses, losses, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(own.updates[name], delta, atol=EXACT, rtol=EXACT)


def test_early_stopping_keeps_the_check_with_the_least_validation_loss():
    model, targets = tiny_llama(), ["layers.2.self_attn.o_proj"]
    schedule = Schedule(steps=12, check_every=5, learning_rate=0.1)
    client = dataclasses.replace(CLIENTS[1], validation=tokens_of(4, seed=9))
    plain = dataclasses.replace(CLIENTS[0])
    own, other = train_adapters(model, [client, plain], targets, schedule, seed=SEED)
    checks = {}
    for steps in (5, 10, 12):  # after the last step too
        _, adapted = train_alone(model, client, targets, dataclasses.replace(schedule, steps=steps), seed=SEED)
        total, count = summed_loss(adapted, client.validation)
        checks[steps] = (total.item() / count, factors_of(adapted))
    best = min(checks, key=lambda steps: checks[steps][0])
    assert own.best_step == best < 12, "otherwise the test shows nothing"
    for name, (B, _, _) in checks[best][1].items():
        torch.testing.assert_close(own.updates[name].B, B, atol=EXACT, rtol=EXACT)
    assert other.best_step is None and len(own.losses) == 12


def without_token(client, token):
    examples = [dict(e, input_ids=e["input_ids"].clamp(max=token - 1)) for e in client.examples]
    return dataclasses.replace(client, examples=examples)


def test_a_client_without_finite_loss_is_named_and_does_not_touch_the_others():
    model, targets = tiny_llama(), ["o_proj", "down_proj"]
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = torch.nan
    ada, bob, cleo = (without_token(client, 39) for client in CLIENTS)
    bob.examples[1]["input_ids"][0] = 39
    trained = train_adapters(model, [ada, bob, cleo], targets, FULL, seed=SEED)
    assert [own.status for own in trained] == ["trained", "diverged", "trained"]
    assert trained[1].diverged_at == 1 and trained[1].updates == {} and trained[1].losses.isnan().all()
    assert_as_alone(model, [ada, cleo], targets, FULL, [trained[0], trained[2]])


def test_a_client_whose_loss_grows_past_all_bounds_is_given_up(monkeypatch):
    monkeypatch.setattr(training, "DIVERGED", 10.0)
    model, targets, done = tiny_llama(), ["lm_head"], []  # no norm behind it: logits grow with the step
    bob = dataclasses.replace(CLIENTS[1], alpha=1e6)
    clients = [CLIENTS[0], bob, CLIENTS[2]]
    trained = train_adapters(model, clients, targets, FULL, seed=SEED, progress=lambda *at: done.append(at))
    assert [own.status for own in trained] == ["trained", "diverged", "trained"]
    assert 1 < trained[1].diverged_at < 6 and trained[1].losses[-1] > 10 * trained[1].losses[0]
    assert len(trained[1].losses) == trained[1].diverged_at
    assert_as_alone(model, CLIENTS[::2], targets, FULL, trained[::2])
    assert done[-1] == (18, 18) and done == sorted(done), "a client given up has no steps left"


def test_weights_that_are_not_finite_at_the_end_are_not_given_out():
    trained = train_adapters(tiny_llama(), CLIENTS, ["o_proj"], Schedule(steps=1, learning_rate=torch.inf), seed=SEED)
    for own in trained:
        assert own.losses.isfinite().all() and own.diverged_at == 1 and own.updates == {}


def test_the_model_is_left_as_it_was():
    model = tiny_llama().train()
    flags = [w.requires_grad for w in model.parameters()]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]

    def interrupt(*_):
        raise KeyboardInterrupt

    train_adapters(model, CLIENTS, ["o_proj"], Schedule(steps=2), seed=SEED)
    with pytest.raises(KeyboardInterrupt):
        train_adapters(model, CLIENTS, ["o_proj"], Schedule(steps=2), seed=SEED, progress=interrupt)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert [w.requires_grad for w in model.parameters()] == flags and model.training and model.config.use_cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_drawn_depends_on_seed_and_names_alone():
    model = tiny_llama()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = train_adapters(model, CLIENTS, ["o_proj"], PARTS, seed=SEED)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other = train_adapters(model, CLIENTS, ["o_proj"], PARTS, seed=SEED)
    third = train_adapters(model, CLIENTS, ["o_proj"], PARTS, seed=SEED + 1)
    for own, same, new in zip(one, other, third, strict=True):
        assert torch.equal(own.losses, same.losses)
        name = next(iter(own.updates))
        assert torch.equal(own.updates[name].A, same.updates[name].A)
        assert not torch.equal(own.updates[name].A, new.updates[name].A)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_saved_adapters_give_peft_the_same_model(make, tmp_path):
    model = make(torch.float32)
    clients, targets = (CLIENTS, ["o_proj"]) if make is tiny_llama else (CLASSIFIERS, ["query", "output.dense"])
    trained = train_adapters(model, clients, targets, FULL, seed=SEED)
    folders = save_adapters(model, trained, tmp_path)
    assert [folder.name for folder in folders] == [client.name for client in clients]
    assert sorted(tmp_path.iterdir()) == sorted(folders), "nothing half-written is left"
    for client, folder in zip(clients, folders, strict=True):
        _, adapted = train_alone(model, client, targets, FULL, seed=SEED)
        loaded = peft.PeftModel.from_pretrained(make(torch.float32), str(folder)).eval()
        ids = client.examples[0]["input_ids"][None]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, atol=SINGLE, rtol=SINGLE)
        config = loaded.peft_config["default"]
        assert (config.r, config.lora_alpha, config.use_rslora) == (client.rank, client.alpha, client.use_rslora)


def test_saving_replaces_adapters_only(tmp_path):
    model = tiny_llama(torch.float32)
    first, second = (train_adapters(model, CLIENTS[:1], ["o_proj"], FULL, seed=seed) for seed in (1, 2))
    save_adapters(model, first, tmp_path)
    (folder,) = save_adapters(model, second, tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, str(folder))
    name = next(iter(second[0].updates))
    assert torch.equal(factors_of(loaded)[name][1], second[0].updates[name].A)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no adapter folder"):
        save_adapters(model, [dataclasses.replace(second[0], name="other")], tmp_path)


def test_training_goes_on_from_saved_adapters(tmp_path):
    model, targets = tiny_llama(torch.float32), ["q_proj", "o_proj"]
    folders = save_adapters(model, train_adapters(model, CLIENTS, targets, FULL, seed=SEED), tmp_path)
    # ranks, alphas and rsLoRA come from the folders
    again = [ClientData(c.name, c.examples, start=folder) for c, folder in zip(CLIENTS, folders, strict=True)]
    trained = train_adapters(model, again, targets, FULL, seed=SEED)
    for client, folder, own in zip(CLIENTS, folders, trained, strict=True):
        adapted = peft.PeftModel.from_pretrained(tiny_llama(torch.float32), str(folder), is_trainable=True).eval()
        losses, _ = train_alone(model, client, targets, FULL, seed=SEED, adapted=adapted)
        torch.testing.assert_close(own.losses, losses, atol=SINGLE, rtol=SINGLE)
        for name, (B, _, scale) in factors_of(adapted).items():
            torch.testing.assert_close(own.updates[name].B, B, atol=SINGLE, rtol=SINGLE)
            assert own.updates[name].scale == pytest.approx(scale)


def test_autocast_stays_near_float32():
    """bfloat16 has 8 bits: losses within a few parts in 2^8 of those without it."""
    model = tiny_llama(torch.float32)
    plain = train_adapters(model, CLIENTS, ["o_proj", "up_proj"], FULL, seed=SEED)
    mixed = train_adapters(model, CLIENTS, ["o_proj", "up_proj"], FULL, seed=SEED, autocast=torch.bfloat16)
    for one, other in zip(plain, mixed, strict=True):
        assert not torch.equal(one.losses, other.losses)
        torch.testing.assert_close(one.losses, other.losses, rtol=2**-5, atol=0)
        assert other.updates["model.layers.0.self_attn.o_proj"].B.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gpu_gives_the_result_of_the_cpu(autocast):
    model, targets = tiny_llama(torch.float32), ["o_proj", "up_proj"]
    here = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED)
    there = train_adapters(model, CLIENTS, targets, PARTS, seed=SEED, device="cuda", autocast=autocast)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-3 if autocast is None else 2**-5, atol=0)
    assert next(model.parameters()).device.type == "cpu"


def refusal(pattern, model=None, clients=CLIENTS, targets=("o_proj",), schedule=FULL, **options):
    with pytest.raises(ValueError, match=pattern) as caught:
        train_adapters(model or tiny_llama(), clients, list(targets), schedule, seed=SEED, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_is_refused_by_name():
    ada = CLIENTS[0]
    tokens, labels = ada.examples[0]["input_ids"], ada.examples[0]["labels"]
    refusal("no module of LlamaForCausalLM has a name like", targets=["c_attn"])
    refusal("'model.norm' is a LlamaRMSNorm; only nn.Linear", targets=["norm"])
    refusal("two clients have the name 'ada'", clients=[ada, ada])
    refusal("'a/b' cannot be a client's name", clients=[dataclasses.replace(ada, name="a/b")])
    refusal("client 'bob' has a full-matrix update", clients=[ada, dataclasses.replace(CLIENTS[1], rank=None)])
    refusal("steps must be at least 1, got 0", schedule=Schedule(steps=0))

    def example(pattern, **changes):
        refusal(pattern, clients=[ClientData("ada", [ada.examples[1], {**ada.examples[0], **changes}])])

    example("'ada': example 1 has 'token_type_ids'", token_type_ids=tokens)
    example("'ada': example 1 has labels of shape", labels=labels[1:])
    first_only = labels.index_fill(0, torch.arange(1, len(labels)), -100)
    example("'ada': example 1 has no label after its first token", labels=first_only)
    example("'ada': example 1 has a token outside 0 .. 39", input_ids=tokens + 40)
    example("'ada': example 1 has a label outside 0 .. 39", labels=labels.clamp(min=0) + 40)
    long = torch.zeros(33, dtype=torch.long)
    example("'ada': an example has 33 tokens, the model takes at most 32", input_ids=long, labels=long)


def test_a_folder_that_does_not_fit_is_refused_by_client(tmp_path):
    model = tiny_llama(torch.float32)
    (folder,) = save_adapters(model, train_adapters(model, CLIENTS[:1], ["q_proj"], FULL, seed=SEED), tmp_path)
    elsewhere, nowhere = (dataclasses.replace(CLIENTS[0], start=start) for start in (folder, tmp_path))
    refusal("client 'ada': .* lacks 'model.layers.0.self_attn.o_proj', unlike the targets", clients=[elsewhere])
    refusal("client 'ada': adapter_config.json is missing", clients=[nowhere])
