"""The text-copying base model: a small `transformers` Llama, built from a config, trained and cached."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from clairlib.core.code import module_digest
from clairlib.core.seeds import derive
from studies.common.cache import made_once
from studies.text_copying import task as copying

CACHE = Path("runs") / "cache"
FACTS = "training.json"


@dataclass(frozen=True)
class BaseConfig:
    """Parameters of the base model and of its training by AdamW.

    Training stops once both copying accuracies exceed `target`. Two choices matter. Positions are rotary, as in Llama:
    learned absolute positions do not generalise to longer segments. Initial weights are larger than transformers'
    default of 0.02, with which so small a model does not learn to copy.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 1
    intermediate: int = 4
    initializer_range: float = 0.1
    learning_rate: float = 2e-3
    batch: int = 50
    target: float = 0.96
    check_every: int = 50
    max_steps: int = 1500
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """A trained base model, the name that adapters record, and its copying accuracies (fractions of tokens)."""

    model: LlamaForCausalLM
    name: str
    steps: int
    seconds: float
    in_distribution: float
    out_of_distribution: float


def base_model(config: BaseConfig | None = None, *, cache: Path | str = CACHE) -> Base:
    """Return the trained base model, from `cache` if the same code has trained the same configuration before.

    A cache entry is a `save_pretrained` folder (safetensors) that appears as a whole or not at all.

    Raises
    ------
    RuntimeError
        The target accuracy is not reached within ``config.max_steps``.
    """
    config = config or BaseConfig()
    folder = made_once(Path(cache) / base_name(config), lambda place: _save(train_base(config), place))
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    # adapters record this name; a path would tie them to one machine
    model.name_or_path = model.config._name_or_path = folder.name
    return Base(model.eval().requires_grad_(False), folder.name, **json.loads((folder / FACTS).read_text()))


def base_name(config: BaseConfig) -> str:
    """Return a name that changes with the configuration, the training code, and the libraries' versions."""
    code = module_digest(__name__, Path(__file__))  # all that trains a base
    facts = [asdict(config), code, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    return f"copying-base-{digest.hexdigest()[:12]}"


def build_base(config: BaseConfig) -> LlamaForCausalLM:
    """Build the untrained base model, float32; its weights depend on the configuration's seed alone."""
    llama = LlamaConfig(
        vocab_size=copying.VOCABULARY,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=copying.LENGTH,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(derive(config.seed, "base", "weights").initial_seed())
        return LlamaForCausalLM(llama)


def train_base(config: BaseConfig) -> Base:
    """Train the base model from scratch.

    Raises
    ------
    RuntimeError
        The model misses its target accuracy.
    """
    began = time.perf_counter()
    model, draws = build_base(config), derive(config.seed, "base", "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    inside = outside = 0.0
    for step in range(1, config.max_steps + 1):
        batch = copying.familiar_batch(config.batch, generator=draws)
        loss = cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % config.check_every == 0:
            inside, outside = copying_accuracies(model, seed=config.seed)
            if min(inside, outside) > config.target:
                return Base(model, base_name(config), step, time.perf_counter() - began, inside, outside)
    raise RuntimeError(
        f"after {config.max_steps} steps the base model copies {inside:.3f} in and {outside:.3f} out of "
        f"distribution, not above {config.target}; try another seed or more steps"
    )


@torch.no_grad()
def copying_accuracies(model: nn.Module, *, seed: int, count: int = 200) -> tuple[float, float]:
    """Measure teacher-forced accuracy in and out of distribution, on sequences that training does not see."""
    inside = copying.familiar_batch(count, generator=derive(seed, "base", "in distribution"))
    outside = copying.unfamiliar_batch(count, generator=derive(seed, "base", "out of distribution"))
    one, other = (copying.copy_accuracy(model(b.tokens).logits, b.targets).overall for b in (inside, outside))
    return one, other


def unembedding(base: Base) -> Tensor:
    """Return W_U (V, hidden), from the normalised residual stream to logits, including the final norm's gain."""
    return (base.model.lm_head.weight * base.model.model.norm.weight).detach()


def _save(base: Base, folder: Path) -> None:
    base.model.save_pretrained(folder)
    facts = {key: value for key, value in vars(base).items() if key not in ("model", "name")}
    (folder / FACTS).write_text(json.dumps(facts))
