"""Floor 4: LoRA adapters of many clients, trained at once on one frozen base model."""

from clairlib.training.saving import TrainedClient, save_adapters
from clairlib.training.schedule import ClientData, Schedule
from clairlib.training.trainer import train_adapters

__all__ = ["ClientData", "Schedule", "TrainedClient", "save_adapters", "train_adapters"]
