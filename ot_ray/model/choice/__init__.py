"""Which layers of the middle an emulator keeps: a table of choices, a file each; and what smaller maps start from."""

from ot_ray.model.choice.choose import CHOICES, Choice, choose_layers
from ot_ray.model.choice.factors import smaller_layers

__all__ = ["CHOICES", "Choice", "choose_layers", "smaller_layers"]
