"""Records of finished modules of an alignment, on disk, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clairlib.alignment.module import Aligned
from clairlib.core import state_file
from clairlib.recovery.refinement import Gain
from clairlib.recovery.result import ModuleSummary
from clairlib.recovery.verdict import ModuleScores

READING = "reading."
ARRAYS = ("scores", "sizes", "spectrum")  # fields of a summary that are
NUMBERS = ("variance", "common")  # fields of a reading that are no tensors


@dataclass(frozen=True)
class Records:
    """Finished modules of the pass ``key`` over all modules; a record of another pass does not count."""

    folder: Path
    key: str

    @classmethod
    def of_pass(cls, folder: Path, benign: Tensor, known: Tensor, refine_any: bool) -> Records:
        """Return the records of the pass with these sets (K,) bool, with or without refinement."""
        facts = [benign.tolist(), known.tolist(), refine_any]
        return cls(folder, hashlib.sha256(json.dumps(facts).encode()).hexdigest())

    def begun(self) -> bool:
        """Return whether this pass is the one that was begun last."""
        mark = self.folder / "pass"
        return mark.exists() and mark.read_text() == self.key

    def begin(self) -> None:
        """Remove the records of other passes and mark this pass as begun."""
        for old in self.folder.iterdir():
            old.unlink()
        (self.folder / "pass").write_text(self.key)

    def read(self, name: str) -> Aligned | None:
        """Return the result of a module; None if it is not done."""
        path = self._path(name)
        if not path.exists():
            return None
        tensors, facts = state_file.load(path, self.key)
        summary = facts["summary"] | {name: tensors[name] for name in ARRAYS}
        summary["spectrum"] = summary["spectrum"].numpy()
        summary |= {"shape": tuple(summary["shape"]), "gain_terms": Gain(**summary["gain_terms"]), "certificate": None}
        own: dict[str, Any] = {name: facts[name] for name in NUMBERS}
        own |= {name[len(READING) :]: value for name, value in tensors.items() if name.startswith(READING)}
        reading = ModuleScores(**own)
        return Aligned(ModuleSummary(**summary, p_values=reading.p_values), reading, facts["errors"])

    def write(self, name: str, done: Aligned) -> None:
        """Store the result of a module; call this after the module's adapters have been written."""
        summary = {key: value for key, value in vars(done.summary).items() if key not in (*ARRAYS, "p_values")}
        summary |= {"gain_terms": asdict(done.summary.gain_terms), "certificate": None}
        own = done.reading
        tensors = {name: torch.as_tensor(getattr(done.summary, name)) for name in ARRAYS}
        tensors |= {f"{READING}{name}": value for name, value in own.tensors.items()}
        facts = {"fingerprint": self.key, "summary": summary, "errors": done.errors}
        facts |= {name: getattr(own, name) for name in NUMBERS}
        state_file.save(self._path(name), tensors, facts)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
