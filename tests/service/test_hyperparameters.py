"""What "auto" comes to."""

from __future__ import annotations

import pytest

from ot_ray.model.tuning import METHODS
from serve.controller.hyperparameters import BASE_LEARNING_RATES, resolve


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"),
    [
        (1, 25, 1),
        (4, 25, 1),
        (10, 10, 1),
        (33, 4, 1),
        (34, 3, 1),
        (1_000, 3, 2),
        (8_333, 3, 17),
        (8_334, 2, 17),
        (20_000, 1, 40),
        (128_000, 1, 256),
        (10_000_000, 1, 256),
    ],
)
def test_auto_follows_from_the_number_of_examples(examples: int, epochs: int, batch: int) -> None:
    found = resolve({"n_epochs": "auto", "batch_size": "auto"}, tuning_method="lora", examples=examples)
    assert (found.n_epochs, found.batch_size) == (epochs, batch)
    assert (found.learning_rate_multiplier, found.learning_rate) == (1.0, BASE_LEARNING_RATES["lora"])


@pytest.mark.parametrize(
    ("tokens", "most", "epochs"), [(100, 1_000, 3), (100, 299, 2), (100, 250, 2), (100, 99, 1), (0, 10, 3)]
)
def test_auto_epochs_stay_within_the_tokens(tokens: int, most: int, epochs: int) -> None:
    assert resolve({}, tuning_method="full", examples=100, tokens=tokens, most_tokens=most).n_epochs == epochs


def test_numbers_that_were_asked_for_stay_whatever_the_data() -> None:
    asked = {"n_epochs": 7, "batch_size": 200, "learning_rate_multiplier": 0.5}
    found = resolve(asked, tuning_method="bitfit", examples=10, tokens=1_000, most_tokens=1)
    assert found.model_dump() == {
        "n_epochs": 7,
        "batch_size": 200,
        "learning_rate_multiplier": 0.5,
        "learning_rate": 0.5 * BASE_LEARNING_RATES["bitfit"],
        "tuning_method": "bitfit",
    }


def test_each_is_resolved_by_itself() -> None:
    found = resolve({"n_epochs": 2, "batch_size": "auto"}, tuning_method="full", examples=5_000)
    assert (found.n_epochs, found.batch_size) == (2, 10)


def test_base_rates_are_known_for_every_method_and_can_be_set() -> None:
    assert set(BASE_LEARNING_RATES) == set(METHODS)
    found = resolve({"learning_rate_multiplier": 3}, tuning_method="full", examples=10, base_rates={"full": 2e-5})
    assert found.learning_rate == pytest.approx(6e-5, rel=1e-12)
