"""What a result was made with: versions, device, code. Names no path, user or host: fit to publish."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("clairlib", "torch", "transformers", "peft", "datasets", "numpy", "scipy", "pandas", "matplotlib")


def collect(**extra: Any) -> dict[str, Any]:
    """Versions, device, processors, git commit and time of this process, then whatever ``extra`` adds.

    ``git`` is {"commit": str, "dirty": bool} of the checkout that clairlib is imported from, None for an
    installed copy; ``versions`` leaves out packages that are not installed; ``time`` is UTC, to the second.

    Raises
    ------
    ValueError
        When ``extra`` names a field that is collected here.
    """
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if taken := facts.keys() & extra.keys():
        raise ValueError(f"provenance collects {', '.join(sorted(taken))} itself; use another name")
    return facts | extra


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the git checkout whose top is ``folder`` and whether its files differ; None if it is none.

    A repository that merely encloses the folder (an environment inside someone's project) does not count.
    Files under ``figures`` and ``docs`` do not make it dirty: they are results, written while a run is still going on,
    and text.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != folder.resolve():
        return None
    changes = _git(folder, "status", "--porcelain", "--", ".", ":(exclude)figures", ":(exclude)docs")
    return {"commit": commit, "dirty": changes != ""}


def is_ancestor(folder: Path, commit: str) -> bool:
    """Whether a commit is an ancestor of the folder's checkout, or it; False where git does not know it."""
    return _git(folder, "merge-base", "--is-ancestor", commit, "HEAD") is not None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a hung file system
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
