"""What decides an emulator's weights is in its identity; what does not is not."""

from __future__ import annotations

import pytest

from ot_ray.training import DistillConfig
from ot_ray.training.identity import differences, identity_digest, run_identity

SOUND = {
    "model": {"name": "tiny", "source": "model"},
    "split": {"bottom": 1, "keep": 2, "top": 1},
    "emulator": {},
    "data": {"source": "text.jsonl"},
    "training": {"steps": 10, "batch_size": 4},
    "store": "store",
    "run": "night",
}


def _identity(model_version: str = "m1", data_digest: str = "d1", **sections):
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in SOUND.items()}
    for name, change in sections.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    return run_identity(DistillConfig.model_validate(values), model_version, data_digest)


DECIDES = {
    "another model": ({"model_version": "m2"}, ["model.version"]),
    "other text": ({"data_digest": "d2"}, ["data.digest"]),
    "another split": ({"split": {"keep": 1}}, ["split.keep"]),
    "another order of the text": ({"data": {"shuffle_window": 7}}, ["data.shuffle_window"]),
    "another rate": ({"training": {"lr": 0.5}}, ["training.lr"]),
    "another batch": ({"training": {"batch_size": 8}}, ["training.batch_size"]),
    "another length": ({"sequence_length": 64}, ["sequence_length"]),
    "another choice of layers": ({"emulator": {"layers": "cka"}}, ["emulator"]),
    "pruned weights": ({"emulator": {"sparsity": 0.5}}, ["emulator"]),
    "quantized weights": ({"emulator": {"bits": 4}}, ["emulator"]),
}


@pytest.mark.parametrize("change", DECIDES)
def test_what_decides_the_weights_changes_the_identity(change):
    values, names = DECIDES[change]
    changed = _identity(**values)
    assert differences(_identity(), changed) == names
    assert identity_digest(changed) != identity_digest(_identity())


@pytest.mark.parametrize(
    "change",
    [
        {"store": "elsewhere"},
        {"run": "another"},
        {"model": {"source": "moved"}},
        {"data": {"source": "moved.jsonl"}},
        {"data": {"workers": 5, "prefetch": 9, "passes": 3}},
        {"training": {"zero_stage": 3, "micro_batch_size": 1, "checkpoint_every": 5, "keep_checkpoints": 9}},
    ],
)
def test_how_it_is_computed_does_not(change):
    assert identity_digest(_identity(**change)) == identity_digest(_identity())


def test_bits_differ_from_bits_by_name():
    four, eight = (_identity(emulator={"bits": bits}) for bits in (4, 8))
    assert differences(four, eight) == ["emulator.bits"]


def test_emulators_that_only_drop_layers_keep_their_names():
    """Versions are named by the identity; what was made before more could be said of an emulator is not made again."""
    assert "emulator" not in _identity()
