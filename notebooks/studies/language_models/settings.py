"""Base models and data of the language study: two bases that every machine can train, and bases from the hub.

All bases are used alike: a base is a folder or a name on the hub, and its data are texts with classes.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import transformers

from clairlib.core.code import module_digest
from studies.common.cache import made_once
from studies.language_models import pairs as language_pairs
from studies.language_models import tiny_models as language_tiny
from studies.language_models.bases import LanguageBase, load_base, train_classifier
from studies.language_models.clients import split_texts
from studies.language_models.texts import Texts, load_texts, standard_library
from studies.language_models.tiny_models import train_tiny

STANDARD_LIBRARY = "standard library"
TEST = 30  # test texts of every class, the same for all clients
SPARE = ("Law", "Art", "Music", "Food", "Travel", "Health", "Weather", "History", "Fashion", "Religion", "School")
MADE_HERE: dict[str, Callable[[Texts, Path], None]] = {"MiniLM": train_classifier, "tiny Llama": train_tiny}
"""Bases that are trained here and saved in a cache folder: name -> function that trains the base on public texts."""


WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # Llama modules that write to the residual stream
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")  # read it


@dataclass(frozen=True)
class Setting:
    """A base model, its data, the adapted modules, and the training parameters.

    Attributes
    ----------
    base : str
        A key of ``MADE_HERE``, a folder, or a name on the hub.
    texts : str
        ``STANDARD_LIBRARY``, or a source of `load_texts`.
    targets : tuple of str
        Modules that are adapted.
    learning_rate, steps
        Of full-batch AdamW.
    shared : int
        m, the number of labels that the benign clients reword.
    spare : tuple of str
        Labels without a class, which contaminated clients may write.
    length : int
        Largest number of tokens of an example.
    """

    base: str
    texts: str
    targets: tuple[str, ...]
    learning_rate: float
    steps: int = 40
    shared: int = 5
    spare: tuple[str, ...] = ()
    length: int = 32

    @property
    def rank(self) -> int:
        """Rank of the shared subspace: m - 1 differences of the shared labels' output rows."""
        return self.shared - 1


def _ag_news(base: str, layers: int) -> Setting:
    """Return a setting with a causal model of the hub on AG News.

    Benign clients reword all four classes. The adapted modules are those of the last layer that write to the residual
    stream.
    """
    targets = tuple(f"layers.{layers - 1}.{name}" for name in WRITERS)
    return Setting(base, "fancyzhx/ag_news", targets, learning_rate=1e-3, shared=4, spare=SPARE, length=96)


SETTINGS = {
    "MiniLM": Setting(
        "MiniLM", STANDARD_LIBRARY, ("layer.5.attention.output.dense", "layer.5.output.dense"), learning_rate=1e-3
    ),
    "tiny Llama": Setting(
        "tiny Llama", STANDARD_LIBRARY, tuple(f"layers.1.{name}" for name in WRITERS), learning_rate=1e-2
    ),
    "tiny Llama, all modules": Setting(
        "tiny Llama", STANDARD_LIBRARY, tuple(f"layers.1.{name}" for name in (*READERS, *WRITERS)), 5e-3, steps=20
    ),
    "SmolLM2-135M, AG News": _ag_news("HuggingFaceTB/SmolLM2-135M", layers=30),
    "SmolLM2-360M, AG News": _ag_news("HuggingFaceTB/SmolLM2-360M", layers=32),
    "Qwen2.5-0.5B, AG News": _ag_news("Qwen/Qwen2.5-0.5B", layers=24),
}


@lru_cache(maxsize=1)
def parts(texts: str, public: int) -> tuple[Texts, Texts, Texts]:
    """Split the texts: ``public`` per class for the base, ``TEST`` per class for evaluation, the rest for clients."""
    own = standard_library() if texts == STANDARD_LIBRARY else load_texts(texts)
    one, other, rest = split_texts(own, [public, TEST, -1], seed=0)
    return one, other, rest


@lru_cache(maxsize=1)
def base_of(setting: Setting, public: int, cache: Path) -> LanguageBase:
    """Return the setting's base model; a base of ``MADE_HERE`` is trained unless the cache folder holds it."""
    texts = parts(setting.texts, public)[0]
    name: str | Path = setting.base
    if setting.base in MADE_HERE:
        name = made_folder(setting.base, public, partial(MADE_HERE[setting.base], texts), cache)
    return load_base(name, [*texts.names, *setting.spare], length=setting.length)


def made_folder(base: str, public: int, make: Callable[[Path], None], cache: Path) -> Path:
    """Return the folder of a base of ``MADE_HERE``; make it unless the cache has one of the same code and sizes."""
    return made_once(cache / _folder_name(base, public), make)


def _folder_name(base: str, public: int) -> str:
    """Return a name that changes with everything that the base depends on."""
    code = [module_digest(module.__name__, Path(str(module.__file__))) for module in (language_pairs, language_tiny)]
    versions = (platform.python_version(), torch.__version__, transformers.__version__)
    digest = hashlib.sha256(repr((base, public, versions, code)).encode())
    return f"{base.replace(' ', '-')}-{digest.hexdigest()[:12]}"
