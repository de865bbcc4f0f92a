"""The decode loop against Transformers' own `generate`, and sampling against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_service import byte_tokenizer
from transformers import PreTrainedModel

from ot_ray.model import SplitPlan, adapter_state, plug_in
from ot_ray.model.multi_adapter import MultiAdapter
from serve.engine.batch import Batch
from serve.engine.choice import GrowingChoice
from serve.engine.job import BEGUN, Job, Row, Ticket
from serve.engine.plug_ins import PlugIn
from serve.engine.residency import Resident
from serve.engine.sampling import Sampler, Sampling, pick
from serve.engine.scoring import score_prompt, scores_of
from tests.fixtures.models import tokens

GREEDY = Sampling(temperature=0)
PLAN = SplitPlan(bottom=1, keep=2, top=1)


class Noted(GrowingChoice):
    """A choice that notes its tokens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tokens: list[int] = []

    def push(self, token: int, score: Any = None) -> Any:
        self.tokens.append(token)
        return super().push(token, score)


def row_of(prompt: list[int], max_tokens: int, resident: Resident | None = None, **fields: Any) -> Row:
    job = Job("m", None, [prompt], [""], 1, max_tokens, **{"sampling": GREEDY, "seed": 0, **fields})
    ticket = Ticket(job, lambda told: told is BEGUN, lambda: None)
    ticket.resident = resident
    return Row(ticket, 0, Noted(byte_tokenizer(), prompt, 0, ()))


def generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What Transformers makes of a prompt, alone."""
    ids = torch.tensor([prompt])
    made = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=-1
    )
    return made[0, len(prompt) :].tolist()


def test_rows_that_come_and_go_are_what_generate_makes_of_each_alone(family_model: PreTrainedModel) -> None:
    """Prompts of all lengths, longer and shorter answers, two adapters beside the base: greedy, so to the token."""
    many, models, residents = MultiAdapter(family_model), [family_model], [None]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in adapter_state(family_model, PLAN).items()
        }
        models.append(plug_in(family_model, PLAN, state))
        resident = Resident(PlugIn("m", PLAN, 0, ""))
        resident.adapter = many.attach(models[-1], PLAN)
        residents.append(resident)
    batch, rows = Batch(many, frozenset()), []
    # What joins at which step: length of the prompt, tokens to make, model.
    plan = {0: [(9, 12, 0), (3, 30, 1)], 2: [(17, 3, 2)], 5: [(1, 8, 0), (6, 9, 1), (25, 20, 2)], 14: [(5, 90, 0)]}
    for step in range(110):
        joining = []
        for length, count, model in plan.get(step, []):
            prompt = tokens(batch=1, length=length, seed=length)[0].tolist()
            joining.append((row_of(prompt, count, residents[model]), prompt, count, models[model]))
        if joining:
            batch.join([row for row, *_ in joining])
            rows += joining
        elif len(batch):
            batch.step()
    assert len(rows) == 7
    assert not len(batch)
    for row, prompt, count, model in rows:
        assert isinstance(row.growing, Noted)
        assert row.growing.tokens == generated(model, prompt, count)


def test_what_is_not_finite_in_a_row_stays_in_it_and_behind_it(base: PreTrainedModel) -> None:
    many = MultiAdapter(base)
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in adapter_state(base, PLAN).items()}
    broken = Resident(PlugIn("m", PLAN, 0, ""))
    broken.adapter = many.attach(plug_in(base, PLAN, state), PLAN)
    batch, told = Batch(many, frozenset()), []
    prompts = [tokens(batch=1, length=length)[0].tolist() for length in (4, 20, 7, 2)]
    bad = row_of(prompts[1], 9, broken)
    bad.ticket._tell = told.append
    rows = [row_of(prompt, 9) for prompt in (prompts[0], prompts[2])]
    batch.join([rows[0], bad, rows[1]])
    assert batch.rows == rows
    assert "not finite" in str(told[0])
    # The row that was broken is taken by another, whose padding lies where its values were.
    rows.append(row_of(prompts[3], 9))
    batch.join(rows[2:])
    while len(batch):
        batch.step()
    for row in rows:
        assert isinstance(row.growing, Noted)
        assert row.growing.tokens == generated(base, row.prompt, 9)


def test_scores_are_the_models_log_probabilities(base: PreTrainedModel) -> None:
    ids = tokens(batch=1, length=10)
    with torch.inference_mode():
        expected = torch.log_softmax(base(input_ids=ids).logits[0].float(), -1)
        scores = score_prompt(lambda ids: base(input_ids=ids).logits, ids[0].tolist(), top=2)
    assert scores[0].logprob is None
    for place, item in enumerate(scores[1:]):
        assert item.logprob == pytest.approx(expected[place, ids[0, place + 1]].item(), abs=1e-5)
        best = expected[place].topk(2)
        assert list(item.top) == best.indices.tolist()
    [step] = scores_of(torch.tensor([3]), torch.tensor([[0.0, 2.0, 1.0, -1.0]]), top=1)
    assert list(step.top) == [1]
    assert scores_of(torch.tensor([3]), torch.tensor([[0.0, 2.0, 1.0, -1.0]]), top=0)[0].top == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_row_draws_the_same_tokens_beside_any_others(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 40, generator=generator)
    settings = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_p=0.5),
        Sampling(temperature=0.7, presence_penalty=1.5, frequency_penalty=0.3),
        Sampling(logit_bias={3: 5.0, 4: -2.0}, frequency_penalty=0.5, top_p=0.9),
    ]

    def fresh() -> list[Sampler]:
        return [Sampler(sampling, seed) for sampling in settings]

    together, alone = fresh(), fresh()
    for step in range(20):
        moved = logits.roll(step, 1)
        drawn = pick(together, moved).tolist()
        assert pick(together, moved).tolist() == drawn
        for sampler, token in zip(together, drawn, strict=True):
            sampler.move_on(token)
        assert drawn == [sampler.pick(row) for sampler, row in zip(alone, moved, strict=True)]


def draws(sampling: Sampling, logits: torch.Tensor, count: int = 400) -> list[int]:
    return [Sampler(sampling, seed).pick(logits) for seed in range(count)]


def test_seed_decides_and_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    assert draws(Sampling(), logits) == draws(Sampling(), logits)
    share = draws(Sampling(), logits, 2000).count(0) / 2000
    assert share == pytest.approx(0.6, abs=0.04)
    colder = draws(Sampling(temperature=0.5), logits, 2000).count(0) / 2000
    assert colder == pytest.approx(0.36 / 0.46, abs=0.04)


def test_top_p_keeps_the_smallest_nucleus() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(draws(Sampling(top_p=0.0), logits)) == {1}
    assert set(draws(Sampling(top_p=0.5), logits)) == {1}
    assert set(draws(Sampling(top_p=0.7), logits)) == {1, 2}
    assert set(draws(Sampling(top_p=1.0), logits)) == {0, 1, 2}


def test_penalties_and_biases_shift_logits_and_leave_the_given_ones() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0])
    assert Sampler(Sampling(temperature=0, logit_bias={2: 5.0}), 0).pick(logits) == 2
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.8), 0)
    assert [sampler.pick(logits) for _ in range(4)] == [0, 1, 0, 0]
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.4), 0)
    assert [sampler.pick(logits) for _ in range(5)] == [0, 0, 1, 0, 1]
    assert logits.tolist() == [1.0, 0.5, 0.0]


def test_a_bias_is_made_into_a_tensor_once() -> None:
    sampling, logits = Sampling(temperature=0, logit_bias={2: 5.0}), torch.zeros(2, 3)
    samplers = [Sampler(sampling, 0), Sampler(sampling, 1)]
    assert pick(samplers, logits).tolist() == [2, 2]
    assert sampling.bias_on(logits.device) is sampling.bias_on(logits.device)


def test_prompts_are_padded_to_no_more_than_is_read_at_once(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.batch.PREFILL", 20)
    many, read = MultiAdapter(base), []
    base_run = many.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = Batch(many, frozenset())
    rows = [row_of(tokens(batch=1, length=length, seed=length)[0].tolist(), 6) for length in (3, 19, 4, 5)]
    batch.join(rows)
    base_run.remove()
    assert read == [(3, 5), (1, 19)]
    while len(batch):
        batch.step()
    for row in rows:
        assert isinstance(row.growing, Noted)
        assert row.growing.tokens == generated(base, row.prompt, 6)


def test_columns_of_rows_that_left_are_forgotten(base: PreTrainedModel) -> None:
    batch = Batch(MultiAdapter(base), frozenset())
    batch.join([row_of(tokens(batch=1, length=30)[0].tolist(), 4)])
    while len(batch):
        batch.step()
    batch.join([row_of(tokens(batch=1, length=5)[0].tolist(), 4)])
    assert batch._cache.columns == 5
