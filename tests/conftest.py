"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.adapter_clients import plant


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter folders of planted clients, two of them contaminated; to be read only."""
    folder = tmp_path_factory.mktemp("cli") / "clients"
    plant(folder)
    return folder


@pytest.fixture
def work(planted: Path, tmp_path: Path) -> Path:
    """A folder of its own with a copy of the clients in it."""
    shutil.copytree(planted, tmp_path / "clients")
    return tmp_path
