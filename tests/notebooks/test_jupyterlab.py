"""Notebook 00 as a person runs it: in JupyterLab, Run > Run All Cells, then saved. The saved file is judged."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import nbformat
import psutil
import pytest

from helpers.browser import chromium

ROOT = Path(__file__).resolve().parents[2]
NAME = "00_start_here.ipynb"
SECONDS = 1800  # the notebook takes about one minute; a busy machine several
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are drawn too
}
PROMPTS = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"


@pytest.fixture
def page() -> Iterator[Any]:
    with chromium() as browser:
        yield browser.new_page(viewport={"width": 1280, "height": 1000})


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of JupyterLab on a copy of the notebooks; its address ends with /."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "work/notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    settings = tmp_path / "settings"
    for plugin, values in SETTINGS.items():
        package, _, name = plugin.partition(":")
        path = settings / package / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with served(tmp_path / "work/notebooks", os.environ | own, tmp_path / "server.log") as found:
        yield found


@contextmanager
def served(folder: Path, environment: dict[str, str], log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    options += ["--IdentityProvider.token=", "--ServerApp.password=", "--no-browser", "--allow-root"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with log.open("w") as lines, subprocess.Popen(command, env=environment, stdout=lines, stderr=lines) as server:
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_until(lambda: answers(url + "api/status") or died(server, log), 120)
            yield url
        finally:
            kernels = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
            for process in [server, *kernels]:
                process.terminate()
            for process in psutil.wait_procs(kernels, timeout=20)[1]:
                process.kill()
            server.kill()


def answers(url: str) -> bool:
    try:
        return bool(urlopen(url, timeout=10).read())
    except OSError:
        return False


def died(server: subprocess.Popen, log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    return False


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def run_all_and_save(page: Any, address: str) -> None:
    """Open the notebook, choose Run All Cells, wait until the kernel and the page say that it is done, and save."""
    page.set_default_timeout(120_000)
    page.goto(f"{address}lab/tree/{NAME}")
    idle = page.locator("#jp-main-statusbar").get_by_text("Idle")
    idle.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(f"{PROMPTS}.some(text => text !== '[ ]:')")  # it has begun
    page.wait_for_function(f"!{PROMPTS}.includes('[*]:')", timeout=SECONDS * 1000)
    idle.wait_for()
    wait_until(lambda: [kernel["execution_state"] for kernel in kernels(address)] == ["idle"], 120)
    with page.expect_response(lambda answer: answer.request.method == "PUT" and NAME in answer.url) as saved:
        page.get_by_role("menuitem", name="File", exact=True).click()
        page.locator(".lm-Menu-item[data-command='docmanager:save']").click()
    assert saved.value.ok


def kernels(address: str) -> list[dict[str, Any]]:
    return [session["kernel"] for session in json.loads(urlopen(f"{address}api/sessions").read())]


def test_every_cell_of_notebook_00_runs_without_a_word_on_stderr(page: Any, address: str, tmp_path: Path) -> None:
    run_all_and_save(page, address)
    cells = [c for c in nbformat.read(tmp_path / "work/notebooks" / NAME, as_version=4).cells if c.cell_type == "code"]
    outputs = [(cell.id, out) for cell in cells for out in cell.outputs]
    assert [(name, out.ename, out.evalue) for name, out in outputs if out.output_type == "error"] == []
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [(name, out.text) for name, out in outputs if out.get("name") == "stderr"] == []
