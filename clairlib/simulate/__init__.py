"""Floor 3: clients and adapters whose truth is known, and what contaminated ones may send."""

from clairlib.simulate.adapters import Plan, synthesise
from clairlib.simulate.attacks import ATTACKS, attack
from clairlib.simulate.clients import Planted, planted

__all__ = ["ATTACKS", "Plan", "Planted", "attack", "planted", "synthesise"]
