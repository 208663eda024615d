"""Writing of an adapter folder one module at a time, by one process or several."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from clairlib.adapters.config import CONFIG, config_for
from clairlib.adapters.tensors import WEIGHTS, Factors, bytes_of, largest, lay_out, write_at
from clairlib.core.files import AdapterError
from clairlib.linalg.low_rank import LowRank


class AdapterWriter:
    """Write one new adapter folder that ``peft.PeftModel.from_pretrained`` loads, module by module in any order.

    ``config`` is the client's checked configuration, from which :func:`~clairlib.adapters.config.config_for` takes the
    base model. ``modules`` announces shape, rank, dtypes and scale of what will be written. So every factor has its
    place in the file, and memory does not grow with the number of modules. No file is kept open: the writer can be sent
    to other processes, and several may write at once, each module by one of them. The header and the configuration are
    written last; until then no program loads the folder. Use the writer in a folder that appears as a whole
    (:func:`~clairlib.core.files.whole_folder`).
    """

    def __init__(self, folder: Path, config: dict[str, Any], modules: Mapping[str, Factors]) -> None:
        self.folder = folder
        self.modules = dict(modules)
        self._config = json.dumps(config_for(config, self.modules), indent=2, sort_keys=True, allow_nan=False) + "\n"
        self._header, self._places, self.bytes = lay_out(self.modules)

    def create(self) -> None:
        """Create the folder and reserve the file's space on the disk; not to be called for a partly written folder."""
        self.folder.mkdir()
        with FileIO(self.folder / WEIGHTS, "xb") as file:
            if hasattr(os, "posix_fallocate"):  # so that a full disk is noticed now
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            else:
                file.truncate(self.bytes)

    def write(self, module: str, update: LowRank) -> None:
        """Write the module's factors into the file.

        Raises
        ------
        AdapterError
            A factor is not finite (its dtype cannot hold the values), or is not as announced.
        """
        if update.scale != self.modules[module].scale:
            raise AdapterError(f"module {module!r} has scale {update.scale}, not {self.modules[module].scale}")
        pairs = list(zip("BA", self._places[module], (update.B, update.A), strict=True))
        for factor, place, values in pairs:
            if (values.shape, values.dtype) != (place.shape, place.dtype):
                got, expected = f"{tuple(values.shape)} {values.dtype}", f"{place.shape} {place.dtype}"
                raise AdapterError(f"module {module!r}: lora_{factor} is {got}, not {expected} as announced")
            if not math.isfinite(largest(values)):
                raise AdapterError(f"module {module!r}: lora_{factor} does not fit into {values.dtype}")
        with FileIO(self.folder / WEIGHTS, "r+b") as file:
            for _, place, values in pairs:
                write_at(file, place.offset, bytes_of(values.detach().cpu().contiguous()))

    def finish(self) -> None:
        """Complete the folder; call this after every module has been written."""
        with FileIO(self.folder / WEIGHTS, "r+b") as file:
            write_at(file, 0, memoryview(self._header))
        (self.folder / CONFIG).write_text(self._config, encoding="utf-8")
