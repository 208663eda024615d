"""Provenance of a result: versions, device, code. It contains no path, user or host name, so it can be published."""

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
    """Return versions, device, processors, git commit and time of this process, and the fields of ``extra``.

    ``git`` is the `git_state` of the checkout from which clairlib is imported. ``time`` is UTC, to the second. A field
    of ``extra`` that is collected here raises ValueError.
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
    """Return {"commit": str, "dirty": bool} of the git checkout whose top is ``folder``; None if it is no such top.

    A repository that merely encloses the folder (such as an environment inside another project) does not count. Changes
    under ``figures``, where a run writes results while it is going on, and under ``docs`` do not count as dirty.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != folder.resolve():
        return None
    changes = _git(folder, "status", "--porcelain", "--", ".", ":(exclude)figures", ":(exclude)docs")
    return {"commit": commit, "dirty": changes != ""}


def is_ancestor(folder: Path, commit: str) -> bool:
    """Return whether a commit is the checkout's HEAD or an ancestor of it; False if git does not know the commit."""
    return _git(folder, "merge-base", "--is-ancestor", commit, "HEAD") is not None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a hung file system
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions of the packages on which results depend; packages that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
