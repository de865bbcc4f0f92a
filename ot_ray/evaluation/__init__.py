"""How good a model is: perplexity, accuracy on images, and the five settings of offsite tuning side by side."""

from ot_ray.evaluation.accuracy import accuracy, class_mean_head, loss_and_accuracy
from ot_ray.evaluation.five_settings import ACCURACY, PERPLEXITY, SETTINGS, FiveSettings, Measure
from ot_ray.evaluation.gate import GateConfig, Measured, Verdict, judge
from ot_ray.evaluation.perplexity import loss_and_token_accuracy, mean_loss, perplexity
from ot_ray.evaluation.run_report import RunReport

__all__ = [
    "ACCURACY",
    "PERPLEXITY",
    "SETTINGS",
    "FiveSettings",
    "GateConfig",
    "Measure",
    "Measured",
    "RunReport",
    "Verdict",
    "accuracy",
    "class_mean_head",
    "judge",
    "loss_and_accuracy",
    "loss_and_token_accuracy",
    "mean_loss",
    "perplexity",
]
