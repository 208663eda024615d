"""Floor 2: PEFT adapter folders, read and written."""

from clairlib.adapters.collection import AdapterFiles, open_adapters

__all__ = ["AdapterFiles", "open_adapters"]
