"""Floor 2: reading and writing of PEFT adapter folders."""

from clairlib.adapters.collection import AdapterFiles, open_adapters

__all__ = ["AdapterFiles", "open_adapters"]
