"""The independent reference: one client after the other through the whole model, with peft and torch.optim.AdamW."""

import copy
from math import ceil

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from clairlib.core.seeds import derive

VOCABULARY = 40


def tiny_llama(dtype=torch.float64, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.2, **changes})).to(dtype)


def tiny_opt(dtype=torch.float64):
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.1}
    torch.manual_seed(0)
    config = OPTConfig(
        **sizes, word_embed_proj_dim=16, vocab_size=VOCABULARY, max_position_embeddings=32, init_std=0.2
    )
    return OPTForCausalLM(config).to(dtype)


def tiny_bert(dtype=torch.float64):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, initializer_range=0.2)
    return BertForSequenceClassification(config).to(dtype)


def tokens_of(count, *, seed=0, shortest=5, longest=12, classes=None):
    """Random examples of unequal lengths; about half of the positions are labelled, or one class an example."""
    draws, examples = derive(seed, "examples"), []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=draws))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=draws)  # 0 .. 2 are special
        labels = torch.where(torch.rand(length, generator=draws) < 0.5, tokens, -100)
        labels[-1] = tokens[-1]
        if classes is not None:
            labels = torch.randint(classes, (), generator=draws)
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def padded(examples):
    """input_ids, attention_mask and labels of one batch, filled up on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([e["input_ids"] for e in examples], batch_first=True, padding_value=0)
    mask = pad([e.get("attention_mask", torch.ones_like(e["input_ids"])) for e in examples], batch_first=True)
    if examples[0]["labels"].dim() == 0:
        return ids, mask, torch.stack([e["labels"] for e in examples])
    return ids, mask, pad([e["labels"] for e in examples], batch_first=True, padding_value=-100)


def summed_loss(model, examples):
    """Sum of the losses of all labels, and their number."""
    ids, mask, labels = padded(examples)
    logits = model(input_ids=ids, attention_mask=mask).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int((labels != -100).sum())


def with_adapter(model, client, targets, *, seed):
    config = peft.LoraConfig(
        r=client.rank, lora_alpha=client.alpha, target_modules=targets, use_rslora=client.use_rslora
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            A = layer.lora_A["default"].weight
            A.data = A.data.to(layer.base_layer.weight.dtype)
            layer.lora_B["default"].to(layer.base_layer.weight.dtype)
            torch.nn.init.kaiming_uniform_(A, a=5**0.5, generator=derive(seed, client.name, name))
    return adapted


def batch_order(client, schedule, seed):
    """The examples of every step: epochs in random order, or everything at every step."""
    count, steps = len(client.examples), schedule.steps
    size = min(schedule.batch or count, count)
    if schedule.epochs is not None:
        steps = min(steps, schedule.epochs * ceil(count / size))
    draws, order = derive(seed, client.name, "order"), []
    while len(order) < steps:
        epoch = torch.randperm(count, generator=draws).tolist() if size < count else list(range(count))
        order += [epoch[at : at + size] for at in range(0, count, size)]
    return order[:steps]


def train_alone(model, client, targets, schedule, *, seed, adapted=None):
    """Losses of one client, and its peft model, trained step by step."""
    adapted = adapted or with_adapter(model, client, targets, seed=seed)
    weights = [w for w in adapted.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    losses = []
    for chosen in batch_order(client, schedule, seed):
        examples = [client.examples[e] for e in chosen]
        labels = summed_loss(adapted, examples)[1]
        size, loss = ceil(len(examples) / schedule.accumulate), 0.0
        optimizer.zero_grad()
        for at in range(0, len(examples), size):
            part = summed_loss(adapted, examples[at : at + size])[0] / labels
            part.backward()
            loss += part.item()
        if schedule.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, schedule.max_norm)
        optimizer.step()
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64), adapted


def factors_of(adapted):
    """Module name -> (B, A, scale) of a peft model."""
    layers = adapted.get_base_model().named_modules()
    return {
        name: (m.lora_B["default"].weight.detach(), m.lora_A["default"].weight.detach(), m.scaling["default"])
        for name, m in layers
        if isinstance(m, peft.tuners.lora.Linear)
    }
