"""Names of the designs and of the ways in which honest clients differ, and a cell of the study by these names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from studies.unequal_clients.clients import NOISE, Attack, Design, Drawn, Honest, draw

DESIGNS = {
    "50 x 10": Design(),
    "50 x 10, 8 clients": Design(K=8),
    "50 x 10, 60 clients": Design(K=60),
    "64 x 64": Design(p=64, q=64),
    "LoRA, frozen A": Design("frozen", p=128, q=128),
    "LoRA, common start": Design("common", p=128, q=128),
    "LoRA, own start": Design("own", p=128, q=128),
    "8 modules": Design(modules=8),
    "56 modules": Design(modules=56),
}
"""There are 20 clients where it is not said. Modules of several are 50 x 10, of LoRA 128 x 128, adapters of rank 8."""
CONDITIONS = {
    "alike": Honest(),
    "sizes .1": Honest(sizes=0.1),
    "sizes .3": Honest(sizes=0.3),
    "sizes .5": Honest(sizes=0.5),
    "samples 2:1": Honest(samples=2.0),
    "samples 4:1": Honest(samples=4.0),
    "samples 6:1": Honest(samples=6.0),
    "samples 10:1": Honest(samples=10.0),
    "sizes .3, samples 4:1": Honest(sizes=0.3, samples=4.0),
    "heavy entries": Honest(tails="entries"),
    "heavy rows": Honest(tails="rows"),
    "one 10 x as large inside": Honest(large=True),
}
ALL = tuple(name for name in CONDITIONS if name != "samples 6:1")  # of honest clients alone
FEW = ("alike", "sizes .3", "samples 4:1", "heavy rows", "one 10 x as large inside")  # for designs that take long
FIRST = "50 x 10"  # the design in which most is measured
NONE = "nothing"  # no rule is switched off


@dataclass(frozen=True)
class Case:
    """One cell: design and condition by name, what contaminated clients do, and the rule that is switched off.

    Rules are those of `studies.unequal_clients.ablation`.
    """

    design: str = FIRST
    condition: str = "alike"
    attack: Attack = field(default_factory=Attack)
    without: str = NONE

    @property
    def parameters(self) -> dict[str, Any]:
        """The cell as plain values; `Case.of` reads them."""
        own = {"design": self.design, "condition": self.condition, "without": self.without}
        return own | asdict(self.attack)

    @classmethod
    def of(cls, design: str, condition: str, without: str, **attack: Any) -> Case:
        """Return the cell of these plain values."""
        return cls(design, condition, Attack(**attack), without)

    def draw(self, seed: int, index: int) -> Drawn:
        """Draw its clients; the rule that is switched off does not matter."""
        return draw(DESIGNS[self.design], CONDITIONS[self.condition], self.attack, seed=seed, index=index)


def module_attack(placement: str, times_noise: float) -> Attack:
    """Return the attack in single modules by ``PLACEMENTS``, its norm in multiples of that of an update's noise."""
    return Attack("module", energy=(times_noise * NOISE) ** 2, **PLACEMENTS[placement])


PLACEMENTS: dict[str, dict[str, Any]] = {
    "one client": {"count": 1},
    "four, same module": {"count": 4},
    "four, own modules": {"count": 4, "apart": True},
    "four, one step": {"count": 4, "together": True},
}
