"""The one Chromium of the tests, headless. Without it they skip, or fail where CLAIR_BROWSER=required, as in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def chromium() -> Iterator[Any]:
    """Launch it; a playwright ``Browser``, closed at the end."""
    if importlib.util.find_spec("playwright") is None:
        _missing("playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _missing("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def _missing(what: str) -> NoReturn:
    if os.environ.get("CLAIR_BROWSER") == "required":
        pytest.fail(f"CLAIR_BROWSER=required, but {what}", pytrace=False)
    pytest.skip(what)
