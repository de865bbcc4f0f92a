"""The settings of `jobs.make_emulator`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ot_ray.evaluation import GateConfig
from ot_ray.launch import WorkerGroup
from ot_ray.model import METHODS, Method
from ot_ray.training import DistillConfig
from ot_ray.training.planning.hardware import Hardware


class MakeEmulatorConfig(DistillConfig):
    """A distillation, the workers it runs on, and the bundle that comes of it."""

    run: str | None = Field(  # type: ignore[assignment] # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
    )
    """Name of the run; the same name resumes from its last checkpoint. Unset, it follows from what decides the
    emulator's weights, so that the same inputs resume."""
    version: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Version of the bundle; a published version never changes. Unset, it follows from the inputs (`e-` and 12
    digits), so that the same inputs make the same version, once."""
    gate: GateConfig = GateConfig()
    """What the emulator must show before its bundle is published."""
    bundles: str | None = None
    """Folder or address where bundles are published for customers; unset, `store`. It belongs to this one `store`:
    runs of a model keep out of each other's way by a lease in `store`, and not across two of them."""
    workers: WorkerGroup = WorkerGroup()
    """Worker processes of the distillation."""
    address: str | None = None
    """Ray cluster; unset, the one this runs in, or else a local one."""
    on_busy: Literal["leave", "wait"] = "leave"
    """What to do while another run of the same model is going."""
    lease_ttl_s: float = Field(default=120.0, ge=1)
    """Seconds without a sign of life after which another run may take this one's place."""
    retry: bool = False
    """Judge again an emulator that the gate rejected, say after the gate was changed."""
    methods: tuple[Method, ...] = METHODS
    """Tuning methods that the owner accepts back."""
    recommended: dict[str, float | int | str | bool] = {}  # noqa: RUF012 - pydantic copies defaults
    """Hyperparameters recommended to customers."""
    private_key: str | None = None
    """PEM file that signs the bundle; unset, it stays unsigned."""
    expires_days: int | None = Field(default=None, ge=1)
    """Days until customers' tools refuse the bundle; unset, never."""
    price_per_worker_hour: float | None = Field(default=None, ge=0)
    """What an hour of one worker costs, for the report; unset, it states hours alone."""
    log: Literal["bar", "json"] = "bar"
    """Progress as a bar, or as one line of JSON a step; on standard error."""
    plan: bool = False
    """Say what the distillation needs (memory, traffic, time) instead of running it."""
    hardware: str | Hardware | None = None
    """For `plan`: the machine's kind by its name, such as `h200`, or described; unset, `cpu` where workers have no
    GPU."""

    @model_validator(mode="after")
    def _layers_are_chosen(self) -> MakeEmulatorConfig:
        if self.kept is not None:
            raise ValueError("kept is set, but which layers stay follows from emulator.layers; leave it out")
        return self

    @model_validator(mode="after")
    def _gate_has_text(self) -> MakeEmulatorConfig:
        # A regression of 0 is a wish too: not at all worse than the release.
        asked = {"min_gap": self.gate.min_gap > 0, "max_regression": self.gate.max_regression is not None}
        wanted = [name for name, set_ in asked.items() if set_]
        section = "validation" if self.images is None else "validation_images"
        if wanted and getattr(self, section) is None:
            raise ValueError(
                f"gate.{wanted[0]} is {getattr(self.gate, wanted[0])}, but {section} is not set, so that nothing can "
                f"be measured; set {section}.source"
            )
        return self
