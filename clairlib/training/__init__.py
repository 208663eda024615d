"""Floor 4: training of the LoRA adapters of many clients at once, on one frozen base model."""

from clairlib.training.saving import TrainedClient, save_adapters
from clairlib.training.schedule import ClientData, Schedule
from clairlib.training.trainer import train_adapters

__all__ = ["ClientData", "Schedule", "TrainedClient", "save_adapters", "train_adapters"]
