"""How good a model is: perplexity, and the five settings of offsite tuning side by side."""

from ot_ray.evaluation.five_settings import SETTINGS, FiveSettings
from ot_ray.evaluation.gate import GateConfig, Measured, Verdict, judge
from ot_ray.evaluation.perplexity import mean_loss, perplexity
from ot_ray.evaluation.run_report import RunReport

__all__ = [
    "SETTINGS",
    "FiveSettings",
    "GateConfig",
    "Measured",
    "RunReport",
    "Verdict",
    "judge",
    "mean_loss",
    "perplexity",
]
