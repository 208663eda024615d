"""A causal language model small enough to be made here: a Llama from a config, with a tokenizer of its own texts.

It takes the place of a hub's model where there is none, and goes the same way, by its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clairlib.language_bases import PROMPT, LanguageBase, first_tokens
from clairlib.seeds import derive
from clairlib.text_data import Texts

WORDS = 4000  # of the tokenizer
BATCH, LEARNING_RATE = 64, 3e-3


def train_tiny(texts: Texts, folder: Path, *, steps: int = 200, seed: int = 0, length: int = 32) -> None:
    """Save a causal model that answers a public text with the name of its class, as a folder.

    Trained from nothing: AdamW, the loss at the answer alone.
    """
    tokenizer = _tokenizer(texts)
    model = _model(len(tokenizer), length, seed)
    base = LanguageBase(model, tokenizer, texts.names, first_tokens(tokenizer, texts.names), length)
    ids = [base.example(text, label)["input_ids"] for text, label in zip(texts.texts, texts.classes, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = derive(seed, "tiny", "batches")
    for _ in range(steps):
        chosen = [ids[i] for i in torch.randint(len(ids), (BATCH,), generator=draws).tolist()]
        optimizer.zero_grad()
        _answer_loss(model, chosen).backward()
        optimizer.step()
        decay.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Texts) -> Any:
    """Whole words and signs, the most frequent ones; those of the prompt and the labels come first."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[PAD]", "[UNK]"])
    words.train_from_iterator([*texts.texts, *[PROMPT, *texts.names] * len(texts.texts)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def _model(words: int, length: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, initializer_range=0.1, tie_word_embeddings=False, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(derive(seed, "tiny", "weights").initial_seed())
        return LlamaForCausalLM(config)


def _answer_loss(model: LlamaForCausalLM, ids: list[Tensor]) -> Tensor:
    """Mean loss at the last token of every sequence."""
    last = torch.tensor([len(own) - 1 for own in ids])
    padded = pad_sequence(ids, batch_first=True)  # on the right, which no token before it sees
    hidden = model.model(input_ids=padded).last_hidden_state[torch.arange(len(ids)), last - 1]
    return cross_entropy(model.lm_head(hidden), torch.stack([own[-1] for own in ids]))
