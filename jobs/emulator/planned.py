"""`--plan`: what a distillation needs, told before anything runs and without reading weights."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from jobs.emulator.choosing import looks_at_the_model
from jobs.emulator.config import MakeEmulatorConfig
from ot_ray.artifacts import load_shape
from ot_ray.errors import ConfigError
from ot_ray.model import layer_config
from ot_ray.model.loading import DTYPES
from ot_ray.training.planning import Plan, plan_distillation
from ot_ray.training.planning.hardware import hardware_of
from ot_ray.training.planning.table import sized


def show_plan(config: MakeEmulatorConfig) -> None:
    """Print the plan of the fewest workers, which need the most memory each.

    Raises:
        ConfigError: it cannot fit, with what would; or the hardware is not known.
    """
    hardware = config.hardware or (None if config.workers.gpus else "cpu")
    if hardware is None:
        raise ConfigError("hardware is not set, but the workers have GPUs; name their kind: hardware=h200")
    shape = load_shape(config.model)
    plan = plan_distillation(
        shape,
        config.split,
        config.training,
        config.sequence_length,
        config.workers.fewest,
        hardware_of(hardware),
        DTYPES[config.model.dtype],
    )
    print(plan.table(), *_left_out(config, shape, plan), sep="\n", flush=True)
    problems = plan.problems()
    if problems:
        raise ConfigError("\n".join(problems))


def _left_out(config: MakeEmulatorConfig, shape: PreTrainedConfig, plan: Plan) -> Iterator[str]:
    """One line for each thing that the run needs and the plan does not count."""
    emulator = config.emulator
    middle = len(config.split.middle(layer_config(shape).num_hidden_layers))
    if looks_at_the_model(config, middle):
        why = "works out the smaller maps" if emulator.factored else f"chooses layers by {emulator.layers}"
        beside = "what layers return" if not emulator.factored and emulator.layers == "cka" else "gradients"
        yield (
            f"Not in the plan: before the distillation, one worker {why} with the full model in its memory "
            f"({sized(plan.stored_bytes)}), and {beside} of public text beside it."
        )
    set_ = [name for name in ("sparsity", "bits", "attention_rank", "mlp_channels") if getattr(emulator, name)]
    if set_:
        yield (
            f"Not in the plan: what emulator.{', emulator.'.join(set_)} changes; E is planned with layers as large as "
            "the model's own."
        )
