"""Responses of several tokens: pairs, clients, what is learnt and counted, a whole cell and its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.func import functional_call

from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.training.schedule import NO_LABEL
from studies.common.rules import TOLD_RANK
from studies.language_models import responses as language_responses
from studies.language_models.bases import load_base
from studies.language_models.evaluation import Evaluator
from studies.language_models.pairs import AFTER, Pairs, docstrings, examples_of, fitting, load_pairs
from studies.language_models.responses import (
    RESPONSE_SETTINGS,
    RULES,
    Questions,
    ResponseSetting,
    ResponseSizes,
    make_mixed,
    material,
    pairs_of,
    response_cell,
    response_study,
    train_clients,
)
from studies.language_models.settings import WRITERS
from studies.language_models.tables import MEASURES, PROPER, response_lessons, response_table, response_verdicts
from studies.language_models.tiny_models import train_tiny_on_pairs

TOPICS = ("sea", "sky", "law", "tea")
SIZES = ResponseSizes(clients=6, contaminated=2, pairs=20, base_steps=1)


def toy_rows(topics):
    """Thirty instructions of every topic; what is asked about and the topic are in the response."""
    kinds = ("old", "new", "red", "big", "far", "odd")
    return [
        {"instruction": f"tell of the {kind} {topic} {i}", "context": "", "category": topic,
         "response": f"a {kind} {topic} is what {topic} {'men' if i % 2 else 'women'} like."}
        for topic in topics for i in range(5) for kind in kinds
    ]  # fmt: skip


def in_memory(rows):
    return load_pairs({name: [row[name] for row in rows] for name in rows[0]})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Cache folder of a study whose only setting is a model by its folder on JSON lines in Dolly's form."""
    folder = tmp_path_factory.mktemp("responses")
    train_tiny_on_pairs(in_memory(toy_rows(("war", "art"))), folder / "base", steps=30, length=48)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(TOPICS)))
    targets = tuple(f"layers.1.{name}" for name in WRITERS)
    own = ResponseSetting(
        str(folder / "base"), str(folder / "pairs.jsonl"), targets, 1e-2, steps=15, batch=10, length=48, test=6
    )
    patch = pytest.MonkeyPatch()
    patch.setitem(RESPONSE_SETTINGS, "toy", own)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def parts(toy):
    return material(RESPONSE_SETTINGS["toy"], 1, toy)


@pytest.fixture(scope="module")
def cell(toy):
    return response_cell("toy", 0, str(toy), "cpu", **vars(SIZES))


def federation(**changes):
    return make_mixed(**{"clients": 6, "contaminated": 2, "categories": 4, "seed": 0} | changes)


def test_pairs_have_their_context_and_blank_ones_are_left_out():
    columns = {
        "instruction": ["sum up", "why?", " ", "who?"], "context": ["a long text", None, "", ""],
        "response": ["short", "because", "nothing", ""], "category": ["b", "a", "a", "b"],
    }  # fmt: skip
    pairs = load_pairs(columns)
    assert pairs.texts == ["sum up\na long text", "why?"] and pairs.responses == ["short", "because"]
    assert [pairs.names[c] for c in pairs.classes] == ["b", "a"]
    without = load_pairs({name: own[:2] for name, own in columns.items() if name != "context"})
    assert without.texts == ["sum up", "why?"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"instruction": ["a"], "category": ["b"]}, ["in memory", "no column 'response'"]),
        ({"instruction": ["a"], "response": [None], "category": ["b"]}, ["row 0", "no 'response'"]),
        ("nobody/no-such-pairs", ["nobody/no-such-pairs", "cannot be loaded", "offline, give a local"]),
    ],
)
def test_pairs_that_cannot_be_had_are_one_line(source, words):
    with pytest.raises(ValueError) as error:
        load_pairs(source)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("field", "words"), [("base", "give the folder of a saved model"), ("pairs", "offline, give")])
def test_a_setting_of_the_hub_without_it_is_one_line(toy, monkeypatch, field, words):
    hub = replace(RESPONSE_SETTINGS["toy"], **{field: "nobody/nothing-of-this-name"})
    monkeypatch.setitem(RESPONSE_SETTINGS, "hub", hub)
    with pytest.raises(ValueError) as error:
        response_study(["hub"], 1, SIZES, cache=toy)
    assert "\n" not in str(error.value) and words in str(error.value)


def test_docstrings_are_first_sentences_by_package_the_same_again():
    pairs = docstrings(["logging", "_pydecimal"])
    assert pairs == docstrings(["logging", "_pydecimal"]) and pairs.names == ["decimal", "logging"]
    known = dict(zip(pairs.texts, pairs.responses, strict=True))
    assert known["logging.Logger.setLevel(self, level)"] == "Set the logging level of this logger."
    assert known["decimal.Context.add(self, a, b)"] == "Return the sum of the two operands."
    for text, c in zip(pairs.texts, pairs.classes, strict=True):
        assert text.startswith(f"{pairs.names[c]}.")
    both = list(zip(pairs.classes, pairs.responses, strict=True))
    assert len(set(both)) == len(both) and min(map(list(pairs.classes).count, (0, 1))) > 100


def test_clients_have_a_main_category_and_some_of_every_other():
    own = federation(clients=8)
    mains = [int(client.behaviour.busy) for client in own.clients]
    assert sorted(mains[:4]) == [0, 1, 2, 3] and mains[:4] == mains[4:]
    for client, main in zip(own.clients, mains, strict=True):
        assert client.class_probs.sum() == pytest.approx(1) and client.class_probs[main] == pytest.approx(0.5)
        assert (client.class_probs > 0).all() and client.behaviour.shuffled == client.contaminated
    assert int((~own.benign).sum()) == 2
    with pytest.raises(ValueError, match="between 0 and the 6"):
        federation(contaminated=7)


def test_responses_of_contaminated_clients_are_their_own_in_another_order(parts):
    _, test, pool = parts
    for client in federation().clients:
        own = pairs_of(client, pool, 20, seed=0)
        honest = pairs_of(replace(client, behaviour=replace(client.behaviour, shuffled=False)), pool, 20, seed=0)
        assert own.texts == honest.texts and own.classes == honest.classes
        assert len(set(own.texts)) == 20 and not set(own.texts) & set(test.texts)
        assert sorted(own.responses) == sorted(honest.responses)
        assert (own.responses != honest.responses) == client.contaminated
        known = dict(zip(pool.texts, pool.responses, strict=True))
        assert honest.responses == [known[text] for text in honest.texts]


def test_the_response_alone_is_learnt_up_to_the_end_of_the_text(parts):
    base, _, pool = parts
    for example, text, response in zip(examples_of(pool, base.tokenizer, 48), pool.texts, pool.responses, strict=True):
        learnt = example["labels"] != NO_LABEL
        assert base.tokenizer.decode(example["input_ids"][~learnt]) == text + AFTER
        assert base.tokenizer.decode(example["labels"][learnt]) == f" {response}{base.tokenizer.eos_token}"
        assert torch.equal(example["labels"][learnt], example["input_ids"][learnt])


def test_pairs_that_are_too_long_are_left_out_and_shuffled_ones_cut_off(parts):
    base, _, pool = parts
    lengths = [len(e["input_ids"]) for e in examples_of(pool, base.tokenizer, 1000)]
    limit = sorted(lengths)[len(lengths) // 2]
    kept, examples = fitting(pool, base.tokenizer, limit)
    assert kept.texts == [text for text, length in zip(pool.texts, lengths, strict=True) if length <= limit]
    assert [len(e["input_ids"]) for e in examples] == [length for length in lengths if length <= limit]
    long = Pairs(["tell of it"], [0], ["sea"], ["word " * 90])
    assert len(examples_of(long, base.tokenizer, 48)[0]["input_ids"]) == 48


def test_losses_and_hits_are_those_of_the_whole_model_at_the_responses(parts):
    base, test, _ = parts
    examples, draws = examples_of(test, base.tokenizer, 48)[:7], derive(0, "judged")
    targets = [name for name, _ in base.model.named_modules() if name.endswith(WRITERS) and ".1." in name]
    shapes = {name: base.model.get_submodule(name).weight.shape for name in targets}
    updates = {name: 0.1 * torch.randn(2, *shape, generator=draws) for name, shape in shapes.items()}
    found = Evaluator(base.model, examples, targets).predictions(updates)
    for m in range(2):
        weights = {f"{n}.weight": base.model.get_submodule(n).weight + updates[n][m] for n in targets}
        at = 0
        for example in examples:
            ids, labels = example["input_ids"][None], example["labels"][None]
            whole = functional_call(base.model, weights, (), {"input_ids": ids, "labels": labels})
            learnt = labels[0, 1:] != NO_LABEL
            own, at = found[m, at : at + int(learnt.sum())], at + int(learnt.sum())
            hits = whole.logits[0, :-1][learnt].argmax(dim=1) == labels[0, 1:][learnt]
            assert float(own[:, 0].mean()) == pytest.approx(float(whole.loss), rel=1e-4)
            assert torch.equal(own[:, 1].bool(), hits)
        assert at == found.shape[1]


def test_a_cell_has_every_method_for_every_benign_client_and_the_verdict(cell):
    benign = [client for client in federation().clients if not client.contaminated]
    responses = pd.DataFrame(cell["responses"])
    assert list(responses) == ["client", "category", "method", "loss", "predicted"]
    assert list(dict.fromkeys(responses.method)) == ["base", *RULES, "CLAIR", TOLD_RANK]
    assert len(responses) == len(benign) * (len(RULES) + 3)
    assert set(responses.client) == {client.name for client in benign} and responses.predicted.between(0, 1).all()
    others = pd.DataFrame(cell["contaminated"])
    assert list(others) == list(responses) and set(others.method) == {"base", "local", PROPER} and len(others) == 6
    assert not set(others.client) & set(responses.client)
    (verdict,) = cell["verdicts"]
    assert verdict["missed"] == 2 - verdict["hits"] and verdict["told_rank"] in language_responses.TOLD_RANKS
    assert verdict["false_alarms"] == round(verdict["benign_flagged"] * 4) and isinstance(verdict["refined"], bool)
    assert [row["module"] for row in cell["structure"]] == [f"layers.1.{name}" for name in WRITERS]


def test_a_cell_is_the_same_again(cell, toy):
    material.cache_clear()
    assert json.dumps(response_cell("toy", 0, str(toy), "cpu", **vars(SIZES))) == json.dumps(cell)


def test_local_adapters_are_better_than_the_base_on_their_own_pairs(cell):
    responses = pd.DataFrame(cell["responses"]).pivot(index="client", columns="method")
    assert (responses["loss", "local"] < responses["loss", "base"] - 0.2).all()
    assert (responses["predicted", "local"] > responses["predicted", "base"]).all()


def test_a_contaminated_client_would_have_been_better_off_with_its_own_responses_in_place(cell):
    others = pd.DataFrame(cell["contaminated"]).pivot(index="client", columns="method", values="loss")
    assert others[PROPER].mean() < others["local"].mean() - 0.01


def test_who_is_contaminated_does_not_change_what_a_client_learns_when_it_does_not_shuffle(cell, toy):
    nobody = response_cell("toy", 0, str(toy), "cpu", **vars(replace(SIZES, contaminated=0)))
    own = {row["client"]: row["loss"] for row in nobody["responses"] if row["method"] == "local"}
    for row in cell["contaminated"]:
        if row["method"] == PROPER:
            assert row["loss"] == pytest.approx(own[row["client"]], rel=1e-3)
    assert nobody["contaminated"] == [] and nobody["verdicts"][0]["missed"] == 0


def test_a_clients_loss_is_that_of_a_response_token_of_its_own_mix(cell, parts):
    base, test, _ = parts
    client = next(client for client in federation().clients if not client.contaminated)
    loss = tokens = 0.0
    for example, category in zip(examples_of(test, base.tokenizer, 48), test.classes, strict=True):
        with torch.no_grad():
            own = base.model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss
        count = int((example["labels"][1:] != NO_LABEL).sum())
        weight = float(client.class_probs[category]) / 6  # pairs of every category
        loss, tokens = loss + weight * count * float(own), tokens + weight * count
    row = next(row for row in cell["responses"] if row["client"] == client.name and row["method"] == "base")
    assert row["loss"] == pytest.approx(loss / tokens, rel=1e-4)


def test_who_is_told_takes_the_best_of_the_ranks(parts, monkeypatch):
    base, test, pool = parts
    own = federation()
    pairs = {client.name: pairs_of(client, pool, 20, seed=0) for client in own.clients}
    local = train_clients(RESPONSE_SETTINGS["toy"], base, pairs, seed=0, device="cpu")
    asked, dense = Questions(base, test, own, list(local), "cpu"), as_dense(local)
    best, rank = asked.told(dense)
    losses = {}
    for one in language_responses.TOLD_RANKS:
        monkeypatch.setattr(language_responses, "TOLD_RANKS", (one,))
        losses[one] = sum(row["loss"] for row in asked.told(dense)[0])
    assert min(losses, key=losses.__getitem__) == rank and sum(row["loss"] for row in best) == losses[rank]


def test_tables_show_losses_and_shares_with_gains_that_are_better_when_positive():
    values = {"base": [5.0, 4.0], "local": [4.0, 3.0], "CLAIR": [3.5, 3.0]}
    rows = [
        {"setting": "s", "kind": "k", "seed": 0, "client": k, "method": method, "loss": v, "predicted": 1 / v}
        for method, own in values.items()
        for k, v in enumerate(own)
    ]
    table = response_table(pd.DataFrame(rows), over="client").set_index(["measure", "method"])
    row = table.loc[MEASURES["loss"], "CLAIR"]
    assert (row.value, row.gain, row.worst) == (3.25, 0.25, 3.5) and row.low < row.value < row.high and row.best
    row = table.loc[MEASURES["predicted"], "local"]
    assert row.value == pytest.approx((1 / 4 + 1 / 3) / 2) and row.worst == 1 / 4 and row.lead > 0
    lessons = response_lessons(pd.DataFrame(rows), pd.DataFrame(rows[:4]).query("client == 0"), over="client")
    assert lessons.set_index("clients").gain.to_dict() == {"benign": 1.0, "contaminated": 1.0}
    verdicts = [{"missed": 2, "false_alarms": 0, "exact": False, "auc": 0.5, "refined": False, "flagged": 1}]
    verdicts.append(verdicts[0] | {"missed": 1, "refined": True})
    (row,) = response_verdicts(pd.DataFrame(verdicts).assign(setting="s", kind="k")).itertuples()
    assert (row.missed, row.false_alarms, row.auc, row.refined) == (1.5, 0, 0.5, 0.5)


def test_a_study_goes_by_its_settings_and_seeds_from_the_cache_too(toy, cell):
    tables = response_study(["toy"], 1, SIZES, cache=toy)
    assert set(tables) == {"responses", "contaminated", "verdicts", "structure", "spectrum", "angles"}
    first = tables["responses"]
    assert (first.kind == language_responses.KIND).all() and list(first.loss) == [r["loss"] for r in cell["responses"]]
    pd.testing.assert_frame_equal(response_study(["toy"], 1, SIZES, cache=toy)["responses"], first)


def test_the_settings_base_is_a_causal_model_in_float32(parts):
    base, _, _ = parts
    assert base.causal and base.model.dtype == torch.float32
    assert load_base(RESPONSE_SETTINGS["toy"].base, (), length=48).length == 48
