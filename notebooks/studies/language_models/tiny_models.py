"""Causal language models small enough to be trained here: a Llama from a config, with a tokenizer of its own texts.

They replace models of the hub where these are not available, and are used in the same way, through their folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clairlib.core.seeds import derive
from clairlib.training.schedule import NO_LABEL
from studies.language_models.bases import PROMPT, LanguageBase, first_tokens
from studies.language_models.pairs import Pairs, fitting
from studies.language_models.texts import Texts

WORDS, PIECES = 4000, 2000  # vocabulary sizes of the two tokenizers
BATCH, LEARNING_RATE = 64, 3e-3  # for training on labels
PAIRS_BATCH, PAIRS_LEARNING_RATE = 32, 1e-2  # of training on responses, which have many more tokens


def train_tiny(texts: Texts, folder: Path, *, steps: int = 200, seed: int = 0, length: int = 32) -> None:
    """Save, as a folder, a causal model that answers a public text with the name of its class.

    It is trained from scratch by AdamW, with the loss at the answer only.
    """
    tokenizer = _tokenizer(texts)
    model = _model(len(tokenizer), length, seed)
    base = LanguageBase(model, tokenizer, texts.names, first_tokens(tokenizer, texts.names), length)
    examples = [base.example(text, label) for text, label in zip(texts.texts, texts.classes, strict=True)]
    _train(model, examples, steps, BATCH, LEARNING_RATE, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tiny_on_pairs(pairs: Pairs, folder: Path, *, steps: int = 150, seed: int = 0, length: int = 64) -> None:
    """Save, as a folder, a causal model that answers an instruction of public pairs with its response.

    It is trained from scratch as in `train_tiny`, with the loss at all tokens of the response. Its tokens are pieces of
    words.
    """
    tokenizer = _pieces([*pairs.texts, *pairs.responses])
    model = _model(len(tokenizer), length, seed)
    model.config.eos_token_id = tokenizer.eos_token_id
    _train(model, fitting(pairs, tokenizer, length)[1], steps, PAIRS_BATCH, PAIRS_LEARNING_RATE, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(
    model: LlamaForCausalLM,
    examples: Sequence[Mapping[str, Tensor]],
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train with AdamW on batches of examples in the format of `ClientData`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = derive(seed, "tiny", "batches")
    for _ in range(steps):
        chosen = [examples[i] for i in torch.randint(len(examples), (batch,), generator=draws).tolist()]
        optimizer.zero_grad()
        _loss(model, chosen).backward()
        optimizer.step()
        decay.step()


def _tokenizer(texts: Texts) -> Any:
    """Return a tokenizer of the most frequent words and signs, those of the prompt and the labels first."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[PAD]", "[UNK]"])
    words.train_from_iterator([*texts.texts, *[PROMPT, *texts.names] * len(texts.texts)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def _pieces(texts: Sequence[str]) -> Any:
    """Return a tokenizer of frequent word pieces, so that no word is unknown."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["[PAD]", "[EOS]"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", eos_token="[EOS]")


def _model(words: int, length: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, initializer_range=0.1, tie_word_embeddings=False, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(derive(seed, "tiny", "weights").initial_seed())
        return LlamaForCausalLM(config)


def _loss(model: LlamaForCausalLM, examples: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the mean loss over the labels; logits are computed at the labels only."""
    padded = pad_sequence([own["input_ids"] for own in examples], batch_first=True)  # tokens never see later padding
    labels = pad_sequence([own["labels"] for own in examples], batch_first=True, padding_value=NO_LABEL)[:, 1:]
    hidden = model.model(input_ids=padded).last_hidden_state[:, :-1][labels != NO_LABEL]
    return cross_entropy(model.lm_head(hidden), labels[labels != NO_LABEL])
