"""How good a model is: perplexity, and the five settings of offsite tuning side by side."""

from ot_ray.evaluation.five_settings import SETTINGS, FiveSettings
from ot_ray.evaluation.perplexity import mean_loss, perplexity

__all__ = ["SETTINGS", "FiveSettings", "mean_loss", "perplexity"]
