"""The base models and data of the language study: two that every machine can make, and those of a hub.

All go the same way: a base is a folder or a name on the hub, its data are texts with classes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import transformers

from studies.language_models import bases as language_bases
from studies.language_models import pairs as language_pairs
from studies.language_models import texts as text_data
from studies.language_models import tiny_models as language_tiny
from studies.language_models.bases import LanguageBase, load_base, train_classifier
from studies.language_models.clients import split_texts
from studies.language_models.texts import Texts, load_texts, standard_library
from studies.language_models.tiny_models import train_tiny

STANDARD_LIBRARY = "standard library"
TEST = 30  # texts of every class that all clients are judged on
SPARE = ("Law", "Art", "Music", "Food", "Travel", "Health", "Weather", "History", "Fashion", "Religion", "School")
MADE_HERE: dict[str, Callable[[Texts, Path], None]] = {"MiniLM": train_classifier, "tiny Llama": train_tiny}
"""Bases that are saved in a cache folder: name -> what trains one on public texts."""


WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # what a layer of a Llama adds to the residual stream
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")  # take it in


@dataclass(frozen=True)
class Setting:
    """A base model, its data, what is adapted, and how.

    Attributes
    ----------
    base : str
        A key of ``MADE_HERE``, a folder, or a name on the hub.
    texts : str
        ``STANDARD_LIBRARY``, or a source of `load_texts`.
    targets : tuple of str
    learning_rate, steps
        Full-batch AdamW.
    shared : int
        m, how many labels the benign clients reword.
    spare : tuple of str
        Labels of no class, which contaminated clients may write.
    length : int
        Most tokens of an example.
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
        """m - 1 differences of the shared labels' output rows."""
        return self.shared - 1


def _ag_news(base: str, layers: int) -> Setting:
    """A causal model of the hub on AG News, of which all four classes are reworded; the writers of its last layer."""
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
    """Texts for the base, ``public`` of every class; for judging; and the clients' pool, the rest."""
    own = standard_library() if texts == STANDARD_LIBRARY else load_texts(texts)
    one, other, rest = split_texts(own, [public, TEST, -1], seed=0)
    return one, other, rest


@lru_cache(maxsize=1)
def base_of(setting: Setting, public: int, cache: Path) -> LanguageBase:
    """The setting's base model; one made here is trained if the cache folder has none of the same code and sizes."""
    texts = parts(setting.texts, public)[0]
    name: str | Path = setting.base
    if setting.base in MADE_HERE:
        name = made_folder(setting.base, public, partial(MADE_HERE[setting.base], texts), cache)
    return load_base(name, [*texts.names, *setting.spare], length=setting.length)


def made_folder(base: str, public: int, make: Callable[[Path], None], cache: Path) -> Path:
    """Folder of a base that is made here, in the cache folder; made unless there is one of the same code and sizes."""
    folder = cache / _folder_name(base, public)
    if not folder.is_dir():
        _make_whole(make, folder)
    return folder


def _folder_name(base: str, public: int) -> str:
    """Changes with what the base depends on."""
    versions = (platform.python_version(), torch.__version__, transformers.__version__)
    digest = hashlib.sha256(repr((base, public, versions)).encode())
    for module in (language_bases, language_pairs, language_tiny, text_data):
        digest.update(Path(str(module.__file__)).read_bytes())
    return f"{base.replace(' ', '-')}-{digest.hexdigest()[:12]}"


def _make_whole(make: Callable[[Path], None], folder: Path) -> None:
    """Write to a temporary neighbour and rename it; where another process was first, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(staging)
        os.replace(staging, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
