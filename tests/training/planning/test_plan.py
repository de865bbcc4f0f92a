"""What a plan says: the table, what stands against it and what would fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ot_ray.errors import ConfigError, SplitError, UnsupportedModelError
from ot_ray.model import SplitPlan
from ot_ray.training import TrainingConfig
from ot_ray.training.planning import HARDWARE, Hardware, Plan, hardware_of, plan_distillation
from ot_ray.training.planning.alternatives import alternatives
from ot_ray.training.planning.table import sized
from tests.fixtures.models import tiny_image_model, tiny_model

MIB = 2**20
SPLIT = SplitPlan(bottom=1, keep=4, top=1)


def test_the_table_has_every_figure() -> None:
    text = _plan(hardware_of("h100"), workers=2, zero_stage=3, precision="bfloat16").table()
    for wanted in ("opt 1-4-1 on 2 x NVIDIA H100", "ZeRO 3", "M (teacher)", "E (learns)", "teacher's weights"):
        assert wanted in text
    for wanted in ("gradients", "optimiser", "activations", "on the wire", "tokens/s", "hours", "50% of the peak"):
        assert wanted in text
    assert "unknown" not in text


def test_image_models_are_refused_before_anything_is_built() -> None:
    with pytest.raises(UnsupportedModelError, match="'clip': plans are of language models"):
        plan_distillation(
            tiny_image_model("clip").config, SPLIT, TrainingConfig(steps=1), 64, 1, hardware_of("cpu"), torch.float32
        )


def test_the_speed_of_a_cpu_is_unknown_rather_than_guessed() -> None:
    plan = _plan(hardware_of("cpu"))
    assert plan.speed.tokens_per_s is None
    assert plan.speed.hours is None
    assert "unknown" in plan.table()


def test_time_is_arithmetic_at_the_assumed_share_of_the_peak() -> None:
    plan = _plan(HARDWARE["a100-80"], precision="bfloat16", steps=100)
    seconds = plan.speed.flops / (312e12 * 0.5)
    assert plan.speed.tokens_per_s == pytest.approx(8 * 64 / seconds)
    assert plan.speed.hours == pytest.approx(100 * seconds / 3600)


def test_messages_that_take_longer_than_the_arithmetic_set_the_time() -> None:
    slow = HARDWARE["a100-80"].model_copy(update={"link_in_node": 1e6})
    plan = _plan(slow, workers=2, zero_stage=2, precision="bfloat16", steps=3600)
    assert plan.speed.message_s is not None
    assert plan.speed.message_s == pytest.approx(plan.speed.traffic.wire / 1e6)
    assert plan.speed.hours == pytest.approx(plan.speed.message_s)


@pytest.mark.parametrize(
    ("stage", "passes", "gathered", "reduced"),
    # In parameters of E, for two workers: half of what a ring moves, all-reduce counting twice.
    [(0, 1, 0, 1), (0, 4, 0, 1), (1, 4, 0.5, 1), (2, 1, 0.5, 1), (2, 4, 0.5, 4), (3, 1, None, 0.5), (3, 4, None, 2)],
)
def test_messages_by_stage(stage: int, passes: int, gathered: float | None, reduced: float) -> None:
    plan = _plan(hardware_of("h100"), workers=2, zero_stage=stage, micro_batch_size=4 // passes)
    parts, traffic = plan.parts, plan.speed.traffic
    assert traffic.reduced == pytest.approx(reduced * 4 * parts.emulator)
    if gathered is None:
        # All of it going forward; on the way back so small a model is still there.
        weights = parts.full + parts.emulator
        assert traffic.gathered == pytest.approx(passes * 4 * weights / 2)
    else:
        assert traffic.gathered == pytest.approx(gathered * 4 * parts.emulator)


def test_what_is_too_far_from_its_next_use_is_gathered_again() -> None:
    plan = _plan(hardware_of("h100"), workers=2, wide=8192, zero_stage=3)
    parts = plan.parts
    weights = parts.full + 2 * parts.emulator + parts.top - 500_000_000
    assert plan.speed.traffic.gathered == pytest.approx(4 * weights / 2)


def test_one_worker_sends_nothing() -> None:
    for stage in range(4):
        assert _plan(hardware_of("h100"), zero_stage=stage).speed.traffic.wire == 0


def test_a_plan_that_fits_has_no_problems() -> None:
    plan = _plan(hardware_of("h200"))
    assert plan.problems() == []
    assert plan.fits()


@pytest.mark.parametrize(
    ("settings", "workers", "way_out"),
    [
        ({}, 1, "training.activation_checkpointing=true"),
        ({"activation_checkpointing": True}, 1, "training.micro_batch_size=4"),
        ({"activation_checkpointing": True, "micro_batch_size": 1, "wide": 2048}, 4, "training.zero_stage=1"),
    ],
)
def test_a_plan_that_cannot_fit_names_what_would(settings: dict[str, Any], workers: int, way_out: str) -> None:
    roomy = _plan(_device(1 << 40), workers, **settings)
    # One byte less than it needs.
    plan = _plan(_device(roomy.memory.device - 1), workers, **settings)
    (problem,) = plan.problems()
    assert not plan.fits()
    assert "short" in problem
    assert f"it fits with {way_out} (" in problem


def test_changes_are_added_up_where_one_is_not_enough() -> None:
    roomy = _plan(_device(1 << 40))
    both = roomy.memory_by(_training(activation_checkpointing=True, micro_batch_size=1), 1)
    (problem,) = _plan(_device(both.device)).problems()
    assert "it fits with training.activation_checkpointing=true and training.micro_batch_size=1 (" in problem


def test_what_no_change_makes_fit_is_said() -> None:
    (problem,) = _plan(_device(MIB), wide=2048).problems()
    assert "nothing that does not change the losses makes it fit" in problem


def test_the_machine_must_hold_what_is_offloaded() -> None:
    plan = _plan(HARDWARE["h200"], workers=2, zero_stage=2, offload_optimizer=True)
    assert plan.memory.host > 0
    assert plan.memory.optimizer == 0
    small = HARDWARE["h200"].model_copy(update={"host_memory_bytes": plan.memory.host})
    assert "a machine needs" in replace(plan, hardware=small).problems()[0]


def test_the_machine_must_hold_a_checkpoint_while_it_is_written() -> None:
    roomy = [_plan(hardware_of("h100"), workers=2, zero_stage=stage, checkpoint_every=5) for stage in (0, 1)]
    # Without sharding rank 0 alone has a copy, of all; both then come to the same on a machine.
    whole = 12 * roomy[0].parts.emulator
    assert [plan.memory.machine(2) for plan in roomy] == [whole, whole]
    assert [plan.memory.machine(1) for plan in roomy] == [whole, whole // 2]
    for plan, whose in zip(roomy, ("rank 0's alone", "every worker's"), strict=True):
        assert any("checkpoint's copy" in line and whose in line for line in plan.table().splitlines())
        enough, short = (plan.hardware.model_copy(update={"host_memory_bytes": whole - less}) for less in (0, 1))
        assert replace(plan, hardware=enough).fits()
        assert "a checkpoint's copy" in replace(plan, hardware=short).problems()[0]
    never = _plan(hardware_of("h100"), workers=2)
    assert never.memory.machine(2) == 0
    assert "checkpoint's copy" not in never.table()


def test_where_memory_is_shared_a_checkpoint_stands_beside_the_rest() -> None:
    memory = _plan(_device(1 << 40), checkpoint_every=5, activation_checkpointing=True, micro_batch_size=1).memory
    needed = memory.device + memory.machine(1)
    for usable, fits in ((needed, True), (needed - 1, False)):
        shared = _device(usable).model_copy(update={"shared_memory": True})
        plan = _plan(shared, checkpoint_every=5, activation_checkpointing=True, micro_batch_size=1)
        assert plan.fits() is fits


def test_every_way_out_is_a_setting_of_the_command_line() -> None:
    for stage in (0, 2):
        before = _training(zero_stage=stage)
        for name, changed, workers in alternatives(before, 2):
            values = {"workers.count": 2, **{f"training.{field}": value for field, value in before}}
            for setting in name.split(" and "):
                field, _, value = setting.partition("=")
                assert field in values
                values[field] = json.loads(value)
            assert values.pop("workers.count") == workers
            assert {field.removeprefix("training."): value for field, value in values.items()} == dict(changed)


def test_sizes_are_shown_in_a_unit_that_fits_them() -> None:
    assert [sized(count) for count in (0, MIB // 2, 2**30 - MIB, 2**30, 5 * 2**40)] == [
        "0.00 MiB", "0.50 MiB", "1,023.00 MiB", "1.00 GiB", "5,120.00 GiB",
    ]  # fmt: skip
    assert " 0.00 GiB" not in _plan(hardware_of("h100")).table()


def test_processes_on_one_machine_share_its_memory() -> None:
    cpu = Hardware(name="CPU", memory_bytes=1000, shared_memory=True, reserve=0.1, devices_per_node=4)
    assert cpu.usable_bytes(1) == 900
    assert cpu.usable_bytes(2) == 450
    assert cpu.usable_bytes(8) == 225


def test_more_shards_hold_less() -> None:
    sizes = [_plan(hardware_of("h100"), workers=4, wide=2048, zero_stage=stage).memory for stage in range(4)]
    assert sizes[1].optimizer < sizes[0].optimizer
    assert sizes[2].worst.gradients < sizes[0].worst.gradients
    assert sizes[3].teacher * 4 == pytest.approx(sizes[0].teacher, abs=16)
    assert sizes[3].student * 4 == pytest.approx(sizes[0].student, abs=16)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        _plan(hardware_of("h100"), workers=9)
    with pytest.raises(ConfigError, match=r"hardware is 'h300'; use one of: h200"):
        hardware_of("h300")
    with pytest.raises(SplitError, match=r"split\.keep"):
        _plan(hardware_of("h100"), split=SplitPlan(bottom=1, keep=7, top=1))


def test_a_description_of_ones_own_is_taken() -> None:
    own = _device(MIB)
    assert hardware_of(own) is own


def _device(usable: int) -> Hardware:
    return Hardware(name="a small device", memory_bytes=usable, reserve=0.0)


def _training(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"steps": 10, "batch_size": 8, **settings})


def _plan(hardware: Hardware, workers: int = 1, split: SplitPlan = SPLIT, wide: int = 0, **settings: Any) -> Plan:
    """Six layers; a `wide` one's weights are large beside activations and messages."""
    values = tiny_model("opt").config.to_dict()
    if wide:
        values |= {"hidden_size": wide, "ffn_dim": 4 * wide, "word_embed_proj_dim": wide}
    shape = AutoConfig.for_model(**values)
    return plan_distillation(shape, split, _training(**settings), 64, workers, hardware, torch.float32)
