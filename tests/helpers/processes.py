"""Processes that tests start, watch and kill, without a look at the clock."""

from __future__ import annotations

import os
import selectors
import subprocess
from pathlib import Path

HANG_SECONDS = 1800  # nothing takes so long, on any machine, but a product that hangs


class Signals:
    """Lines that other processes write into a named pipe, read as they come."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path, self._held, self._text = path, os.open(path, os.O_RDWR | os.O_NONBLOCK), ""

    def next(self, process: subprocess.Popen) -> str:
        """The next line; an AssertionError where the process ends without one.

        ``process`` must have a pipe as its standard error that nobody else reads; its end is the process's.
        """
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._held, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            said = ""
            while "\n" not in self._text:
                for key, _ in selector.select(HANG_SECONDS) or [(None, 0)]:
                    assert key is not None, "the process hangs"
                    chunk = os.read(key.fd, 4096)
                    if key.fd == self._held:
                        self._text += chunk.decode()
                    elif chunk:
                        said += chunk.decode()
                    else:
                        assert "\n" in self._text, f"the process ended early: {said}"
        line, _, self._text = self._text.partition("\n")
        return line
