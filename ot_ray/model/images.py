"""Image classifiers as the training loops want them: a batch of images in, losses out, for tuning and distilling.

The lanes that distilling runs in are in distill.py and lanes.py; heads in head.py, reading images in data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ot_ray.errors import DataError
from ot_ray.model.distill import DistillOptions, LaneModel
from ot_ray.model.emulator import EmulatorConfig
from ot_ray.model.families import family_of, head_of
from ot_ray.model.lanes import Setting
from ot_ray.model.losses import normalized_mse
from ot_ray.model.split import SplitPlan


class ImageModel(nn.Module):
    """Wraps a full, emulated, plug-in or PEFT image classifier. Letters: B rows, P channels, H and W pixels."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        # PEFT puts its layers into the base model; its own wrapper adds nothing for images.
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels float [B, P, H, W], labels int64 [B].

        Returns:
            Float32 scalars: `loss`, the mean cross-entropy over the rows, and `accuracy`, the share of rows whose
            likeliest class is the right one.
        """
        logits = self.model(pixel_values=pixel_values).logits.float()
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy.detach()}


class ImageDistillModel(LaneModel):
    """An image classifier whose emulator learns from the middle's output alone (as the authors distil vision
    models). A2 and the head take no part in it, so a training pass leaves A2 out.

    Args:
        model, plan, kept, emulator: as for `LaneModel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SplitPlan,
        kept: Sequence[int],
        options: DistillOptions | None = None,
        emulator: EmulatorConfig | None = None,
    ) -> None:
        super().__init__(model, plan, kept, options or DistillOptions(), middle_only=True, emulator=emulator)
        self._tower = family_of(model).layers.partition(".")[0]

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, setting: Setting | None = None
    ) -> dict[str, torch.Tensor]:
        """One pass of teacher and student.

        Args:
            pixel_values: float [B, P, H, W].
            labels: int64 [B], classes of the owner's head; read only with a `setting`.
            setting: evaluate one lane alone, without gradients: the full or the emulated model.

        Returns:
            Float32 scalars, means over the B rows: `loss` and, equal to it, `kd_loss`. With a `setting`, sums over
            the rows: `nll`, cross-entropy in nats, `correct`, and `tokens`, how many rows there are.

        Raises:
            DataError: with a `setting`, there are no labels, or some that are no class of the head.
        """
        self._lanes.begin(setting)
        try:
            if setting is not None:
                return self._counted(pixel_values, labels)
            self.model.get_submodule(self._tower)(pixel_values)
            assert self._lanes.student is not None and self._lanes.teacher is not None
            kd_loss = normalized_mse(self._lanes.student, self._lanes.teacher)
        finally:
            self._lanes.begin(None)
        return {"loss": kd_loss, "kd_loss": kd_loss.detach()}

    def _counted(self, pixel_values: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        head = head_of(self.model)
        assert head is not None
        if labels is None or bool(((labels < 0) | (labels >= head.out_features)).any()):
            given = "missing" if labels is None else f"up to {int(labels.max())}"
            raise DataError(
                f"the labels are {given}, but the model's head has classes 0..{head.out_features - 1}; evaluate it on "
                "images of its own classes"
            )
        with torch.no_grad():
            logits = self.model(pixel_values=pixel_values).logits.float()
        return {
            "nll": cross_entropy(logits, labels, reduction="sum"),
            "correct": (logits.argmax(-1) == labels).sum().float(),
            "tokens": torch.tensor(float(len(labels)), device=logits.device),
        }
