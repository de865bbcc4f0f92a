"""What layers are chosen by is the same in the nightly job and in a study."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from jobs.studies.work import kept_layers
from ot_ray.model import EmulatorConfig, SplitPlan
from ot_ray.training.calibration import ROWS, calibration_text
from tests.fixtures.models import tiny_model
from tests.training.samples import sequences

PLAN = SplitPlan(bottom=1, keep=1, top=1)
COUNT = 10


def watched(model: PreTrainedModel) -> list[int]:
    """The rows of every pass to come."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    return seen


def test_every_sequence_comes_once_in_order() -> None:
    public = sequences(COUNT)
    batches = list(calibration_text(public))
    assert [len(batch["input_ids"]) for batch in batches] == [ROWS, ROWS, COUNT - 2 * ROWS]
    together = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(together, torch.stack([sequence.input_ids for sequence in public]))


@pytest.mark.parametrize("layers", ["cka", "gradient"])
def test_a_study_chooses_by_the_batches_of_the_nightly_job(layers: str) -> None:
    model = tiny_model("opt", depth=4)
    seen = watched(model)
    kept_layers(model, PLAN, EmulatorConfig.model_validate({"layers": layers}), sequences(COUNT))
    assert set(seen) == {ROWS, COUNT - 2 * ROWS}
