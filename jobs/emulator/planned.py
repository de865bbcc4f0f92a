"""`--plan`: what a distillation needs, told before anything runs and without reading weights."""

from __future__ import annotations

from jobs.emulator.config import MakeEmulatorConfig
from ot_ray.artifacts import load_shape
from ot_ray.errors import ConfigError
from ot_ray.model.loading import DTYPES
from ot_ray.training.planning import plan_distillation
from ot_ray.training.planning.hardware import hardware_of


def show_plan(config: MakeEmulatorConfig) -> None:
    """Print the plan of the fewest workers, which need the most memory each.

    Raises:
        ConfigError: it cannot fit, with what would; or the hardware is not known.
    """
    hardware = config.hardware or (None if config.workers.gpus else "cpu")
    if hardware is None:
        raise ConfigError("hardware is not set, but the workers have GPUs; name their kind: hardware=h200")
    plan = plan_distillation(
        load_shape(config.model),
        config.split,
        config.training,
        config.sequence_length,
        config.workers.fewest,
        hardware_of(hardware),
        DTYPES[config.model.dtype],
    )
    print(plan.table(), flush=True)
    problems = plan.problems()
    if problems:
        raise ConfigError("\n".join(problems))
