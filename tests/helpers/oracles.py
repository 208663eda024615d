"""The aggregation and attack code of Flower (flwr) and ByzFL (byzfl), which tests compare ours with.

Both are installed without their requirements (Makefile), so their packages are opened without running their
``__init__``, which would import gRPC, torchvision and more; what is used needs only numpy, scipy and torch.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType


def _bare(name: str) -> ModuleType:
    """Package ``name`` without what its ``__init__`` does; its modules can be imported."""
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is missing: run make setup"
    package = ModuleType(name)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[name] = package
    return package


_bare("byzfl")
from byzfl.aggregators import aggregators as byzfl_aggregators  # noqa: E402
from byzfl.aggregators import preaggregators as byzfl_preaggregators  # noqa: E402
from byzfl.attacks import attacks as byzfl_attacks  # noqa: E402

_bare("flwr")
from flwr.compat.common import parameter, typing  # noqa: E402

_common = _bare("flwr.common")
for _module in (typing, parameter):
    vars(_common).update({name: value for name, value in vars(_module).items() if not name.startswith("_")})
_bare("flwr.server")
_bare("flwr.server.strategy")
from flwr.server.strategy import aggregate as flwr_aggregate  # noqa: E402

__all__ = ["byzfl_aggregators", "byzfl_attacks", "byzfl_preaggregators", "flwr_aggregate"]
