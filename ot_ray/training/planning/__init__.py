"""Planning a distillation without its weights: parameters, memory, messages and time, and what would fit."""

from ot_ray.training.planning.hardware import HARDWARE, Hardware, hardware_of
from ot_ray.training.planning.memory import Memory, Moment
from ot_ray.training.planning.parts import Parts, parts_of
from ot_ray.training.planning.plan import Plan, plan_distillation
from ot_ray.training.planning.speed import Speed, Traffic

__all__ = [
    "HARDWARE",
    "Hardware",
    "Memory",
    "Moment",
    "Parts",
    "Plan",
    "Speed",
    "Traffic",
    "hardware_of",
    "parts_of",
    "plan_distillation",
]
