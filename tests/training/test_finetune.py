"""``clair train``: from folders of JSON-lines to adapters that ``clair align`` takes, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, PreTrainedTokenizerFast

from clairlib.adapters.folder import read_lora
from clairlib.core.seeds import derive
from clairlib.training import ClientData, Schedule
from clairlib.training import finetune as finetuning
from clairlib.training.client_data import data_files, hold_out, read_client
from helpers.adapter_clients import clair, snapshot
from helpers.processes import HANG_SECONDS
from helpers.sequential import VOCABULARY, factors_of, tiny_bert, tiny_llama, train_alone

NAMES = ["ada", "bob", "cleo", "dan"]
OPTIONS = ("--steps", 6, "--batch", 3, "--learning-rate", 0.003, "--rank", 2, "--alpha", 5)


def write_tokenizer(folder: Path) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    own = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_clients(folder: Path, **more: object) -> None:
    """Texts of a client's own words, half of them with a prompt; each client has one more than the one before."""
    for k, name in enumerate(NAMES):
        draws, lines = derive(0, "texts", name), []
        for i in range(8 + k):
            text = " ".join(f"w{int(j)}" for j in torch.randint(10 * k, 10 * k + 8, (7,), generator=draws))
            fields = {"text": text} if i % 2 else {"prompt": text, "completion": " " + text}
            lines.append(json.dumps(fields | more if "label" not in more else {"text": text} | more))
        path = folder / f"{name}.jsonl" if k % 2 else folder / name / "data.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients' data and a base model; to be read only."""
    folder = tmp_path_factory.mktemp("train")
    tiny_llama(torch.float32).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    write_clients(folder / "data")
    return folder


@pytest.fixture
def work(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: object, output: str = "out"):
    return clair("train", "data", "--model", "base", "--output", output, *OPTIONS, *arguments)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("adapter_*")}


def test_trained_adapters_go_into_align(work: Path) -> None:
    result = train()
    assert result.exit_code == 0 and result.stderr == "", result.output
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("4 clients; ") and "in memory" in first and last == "4 adapters written to out"
    assert sorted(path.name for path in (work / "out").iterdir()) == [*NAMES, "report.json"]
    assert sorted(path.name for path in work.iterdir()) == ["base", "data", "out"]  # no checkpoint
    aligned = clair("align", "out", "--output", "aligned")
    assert aligned.exit_code == 0, aligned.output
    assert json.loads((work / "aligned/report.json").read_text())["clients"][0]["name"] == "ada"


def test_report_says_what_was_done(work: Path) -> None:
    assert train("--seed", 3, "--quiet", "--rslora", "--max-length", 8).output == ""
    report = json.loads((work / "out/report.json").read_text())
    assert [client["examples"] + client["validation_examples"] for client in report["clients"]] == [8, 9, 10, 11]
    assert [client["cut_off"] for client in report["clients"]] == [4, 5, 5, 6]  # those with a completion
    assert all(len(client["losses"]) == client["steps"] == 6 for client in report["clients"])
    assert all(client["status"] == "trained" and client["best_step"] == 6 for client in report["clients"])
    assert report["settings"].items() >= {"model": "base", "seed": 3, "rank": 2, "alpha": 5.0, "steps": 6}.items()
    assert {module["name"].split(".")[-1] for module in report["modules"]} == {"o_proj", "down_proj"}
    assert report["memory"]["adapters"] > 0 and "torch" in report["provenance"]["versions"]
    assert json.loads((work / "out/ada/adapter_config.json").read_text())["use_rslora"] is True


def test_adapters_are_those_of_training_each_client_alone_with_peft(work: Path) -> None:
    tiny_llama(torch.float64).save_pretrained("base")  # in float32 AdamW divides by gradients near rounding
    assert train("--validation", 0, "--targets", "q_proj,down_proj").exit_code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    schedule = Schedule(steps=6, batch=3, learning_rate=0.003)
    for name, files in data_files(Path("data")).items():
        client = ClientData(name, read_client(name, files, tokenizer, max_length=32).examples, rank=2, alpha=5)
        alone = factors_of(train_alone(model, client, ["q_proj", "down_proj"], schedule, seed=0)[1])
        _, found = read_lora(Path("out") / name)
        assert found.keys() == alone.keys()
        for module, (B, A, scale) in alone.items():
            torch.testing.assert_close(found[module].B, B, atol=1e-8, rtol=0)
            torch.testing.assert_close(found[module].A, A, atol=1e-8, rtol=0)
            assert found[module].scale == pytest.approx(scale) and B.abs().max() > 1e-3


def test_held_back_examples_are_not_trained_on(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(finetuning, "train_adapters", lambda _, clients, *__, **___: seen.extend(clients) or 1 / 0)
    assert isinstance(train("--validation", 0.4, "--seed", 2).exception, ZeroDivisionError)
    tokenizer = AutoTokenizer.from_pretrained("base")
    for client, (name, files) in zip(seen, data_files(Path("data")).items(), strict=True):
        examples = read_client(name, files, tokenizer, max_length=32).examples
        own, held = hold_out(name, examples, 0.4, seed=2)
        assert len(held) == round(0.4 * len(examples)) > 2
        for kept, expected in ((client.examples, own), (client.validation, held)):
            assert [e["input_ids"].tolist() for e in kept] == [e["input_ids"].tolist() for e in expected]


def test_kill_leaves_no_output_and_resume_gives_the_same_adapters(work: Path) -> None:
    """The process is killed while it waits in the middle of training, its last checkpoint being some steps old."""
    slow = """
import sys, time
import clairlib.training.trainer as training
from clairlib.cli import app

training.CHECKPOINT_SECONDS = 0.0
step, count = training.Run.step, 0

def slow(self):
    global count
    count += 1
    if count == 4:
        training._Keeper.save_now_and_then = lambda self: None
    if count == 5:
        print("stopped", flush=True)
        time.sleep(60)
    step(self)

training.Run.step = slow
app()
"""
    arguments = ["train", "data", "--model", "base", "--output", "out", *map(str, OPTIONS), "--quiet"]
    with subprocess.Popen([sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "stopped\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in work.iterdir()) == [".out.checkpoint", "base", "data"]
    again = train()
    assert again.exit_code == 2 and "--resume" in again.stderr and not (work / "out").exists()
    other = train("--seed", 1, "--resume")
    assert other.exit_code == 2 and "other settings" in other.stderr and (work / ".out.checkpoint").exists()
    assert train("--resume").exit_code == 0 and not (work / ".out.checkpoint").exists()
    assert train(output="whole").exit_code == 0
    assert weights(work / "out") == weights(work / "whole")
    losses = [json.loads((work / out / "report.json").read_text())["clients"] for out in ("out", "whole")]
    assert losses[0] == losses[1]


def test_sigterm_while_writing_leaves_the_checkpoint_alone(work: Path) -> None:
    wait = """
import signal
from clairlib.training import finetune as finetuning
from clairlib.cli import app

def write(model, trained, folder):
    (folder / "ada").mkdir()
    print("writing", flush=True)
    signal.pause()

finetuning.save_adapters = write
app()
"""
    arguments = ["train", "data", "--model", "base", "--output", "out", *map(str, OPTIONS), "--quiet"]
    with subprocess.Popen([sys.executable, "-c", wait, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    assert sorted(path.name for path in work.iterdir()) == [".out.checkpoint", "base", "data"]
    assert train("--resume", "--quiet").exit_code == 0
    assert len(weights(work / "out")) == 2 * len(NAMES)


def test_output_of_an_earlier_run_is_replaced_only_when_asked(work: Path) -> None:
    assert train("--quiet").exit_code == 0
    before = snapshot(work / "out")
    result = train("--quiet", "--seed", 1)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and snapshot(work / "out") == before
    assert train("--quiet", "--seed", 1, "--overwrite").exit_code == 0
    assert weights(work / "out") != {name: content for name, content in before.items() if "adapter_" in name}


def test_a_diverged_client_is_named_and_has_no_adapter(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = finetuning.train_adapters

    def one_diverges(*arguments: object, **options: object) -> list:
        first, *rest = own(*arguments, **options)
        losses = torch.tensor([3.0, float("nan")])
        return [replace(first, updates={}, losses=losses, diverged_at=2, best_step=None), *rest]

    monkeypatch.setattr(finetuning, "train_adapters", one_diverges)
    result = train()
    assert result.exit_code == 0 and result.stderr == "clair: no adapter for 'ada': the loss diverged\n"
    assert "diverged at step 2" in result.stdout and "3 adapters written" in result.stdout
    assert not (work / "out/ada").exists() and (work / "out/bob").is_dir()
    client = json.loads((work / "out/report.json").read_text())["clients"][0]
    assert client["status"] == "diverged" and client["diverged_at"] == 2 and client["losses"] == [3.0, None]


def test_a_classifier_with_its_head_is_trained(work: Path) -> None:
    tiny_bert(torch.float32).save_pretrained("base")
    shutil.rmtree("data")
    write_clients(Path("data"), label="LABEL_1")
    result = train("--targets", "query,value")
    assert result.exit_code == 0, result.output
    losses = [client["losses"] for client in json.loads((work / "out/report.json").read_text())["clients"]]
    assert all(own[-1] < own[0] for own in losses)  # the one class is learnt
    BertModel(tiny_bert().config).save_pretrained("base")
    config = json.loads((work / "base/config.json").read_text())
    (work / "base/config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    refused(work, ("--targets", "query"), "lacks 'classifier.bias'")
    (work / "base/config.json").write_text(json.dumps(config))
    refused(work, ("--targets", "query"), "it is a BertModel")


def refused(work: Path, arguments: tuple, *culprits: str, output: str = "other") -> None:
    before = snapshot(work)
    result = train(*arguments, "--quiet", output=output)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("clair: ") and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    for culprit in culprits:
        assert culprit in result.stderr
    assert snapshot(work) == before


@pytest.mark.parametrize(
    "arguments, culprits",
    [
        (("--model", "nobody/nothing"), ("model 'nobody/nothing'", "give the folder of a saved model")),
        (("--model", "data"), ("model 'data'",)),
        (("--targets", "no_such"), ("no_such", "LlamaForCausalLM")),
        (("--max-length", 33), ("--max-length 33", "32 tokens")),
        (("--validation", 1), ("[0, 1)",)),
        (("--validation", 0.95), ("client 'ada' has 8 example(s)",)),
        (("--bf16",), ("--device cuda",)),
        (("--learning-rate", 1e9), ("every client's loss diverged", "lower it")),
    ],
)
def test_settings_that_cannot_be_used_end_with_one_line(work: Path, arguments: tuple, culprits: tuple) -> None:
    refused(work, arguments, *culprits)


def test_a_bad_line_names_client_file_and_number(work: Path) -> None:
    with (work / "data/bob.jsonl").open("a") as file:
        file.write('\n{"text": "w1", "text": 5}\n')
    refused(work, (), "client 'bob': line 11 of 'bob.jsonl'", "no string but int")


def test_output_is_checked_before_anything_is_read(work: Path) -> None:
    (work / "data/bob.jsonl").write_text("{nope")
    refused(work, (), "lies in the input folder", output="data/out")
    refused(work, (), "cannot write output", output="no/such/place")


def test_a_pickled_checkpoint_is_not_opened(work: Path) -> None:
    os.rename("base/model.safetensors", "base/elsewhere")
    torch.save({}, "base/pytorch_model.bin")
    refused(work, (), "model 'base' cannot be loaded")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_with_bfloat16_products(work: Path) -> None:
    assert train("--device", "cuda", "--bf16").exit_code == 0
    assert len(weights(work / "out")) == 2 * len(NAMES)
