"""Floor 3: planted clients and adapters with a known truth, and attacks on them."""

from clairlib.simulate.adapters import Plan, synthesise
from clairlib.simulate.attacks import ATTACKS, attack
from clairlib.simulate.clients import Planted, planted

__all__ = ["ATTACKS", "Plan", "Planted", "attack", "planted", "synthesise"]
