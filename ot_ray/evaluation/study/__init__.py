"""The report of a study: the paper's tables and figures from measured rows, and the frontier an owner decides on."""

from ot_ray.evaluation.study.report import write_report
from ot_ray.evaluation.study.results import Aim, Measured, Spread, Study

__all__ = ["Aim", "Measured", "Spread", "Study", "write_report"]
