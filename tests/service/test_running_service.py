"""The running service, driven by clients that nobody here wrote: OpenAI's own package, and Transformers with PEFT."""

from __future__ import annotations

import csv
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from ot_ray.launch.cluster import ClusterAddress
from tests.http.tiny_service import BASE
from tests.service.running import Running, running_service, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

QUESTIONS = ["who are you", "what is this", "where is it", "how is it made"]
TENANTS = ["anna", "ben"]


def examples(count: int) -> bytes:
    """Chats as a customer has them, one a line."""
    lines = []
    for i in range(count):
        asked = {"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}
        lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": f"a tiny model {i % 3}"}]}))
    return "\n".join(lines).encode() + b"\n"


@dataclass
class Inbox:
    """What a customer's own server was sent."""

    url: str = ""
    received: list[tuple[dict[str, str], str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    box = Inbox()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            box.received.append((dict(self.headers.items()), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    box.url = f"http://127.0.0.1:{server.server_address[1]}/hooks"
    yield box
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def running(
    local_ray: ClusterAddress,
    checkpoint: Path,
    bundle_folder: Path,
    owner_keys: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    with running_service(folder, local_ray.ray, checkpoint, bundle_folder, owner_keys[1], TENANTS) as service:
        yield service


def client_of(running: Running, tenant: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url, api_key=running.key(tenant), timeout=120, max_retries=4)


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return client_of(running, "anna")


@dataclass(frozen=True)
class Tuned:
    """A job that was waited for, one that was cancelled, and the secret of who is told of both."""

    job: FineTuningJob
    cancelled: FineTuningJob
    training: bytes
    secret: str


@pytest.fixture(scope="module")
def tuned(client: openai.OpenAI, inbox: Inbox) -> Tuned:
    kinds: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.cancelled"]
    secret = client.webhooks.create(name="inbox", url=inbox.url, event_types=kinds).signing_secret
    training = examples(16)
    file = client.files.create(file=("train.jsonl", training), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}}
    asked: Any = {"model": BASE, "training_file": file.id, "validation_file": file.id, "seed": 3}
    job = client.fine_tuning.jobs.create(**asked, suffix="tone", method=method, metadata={"team": "a"})
    assert job.status == "validating_files" and job.hyperparameters.n_epochs == 2
    # One job of a tenant runs at a time, so that this one waits.
    other = client.fine_tuning.jobs.create(**asked)
    assert client.fine_tuning.jobs.cancel(other.id).id == other.id
    jobs = [until(lambda name=name: ended(client, name)) for name in (job.id, other.id)]
    assert secret is not None
    return Tuned(jobs[0], jobs[1], training, secret)


def ended(client: openai.OpenAI, job_id: str) -> FineTuningJob | None:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None


def test_job_succeeds_and_shows_what_it_used(client: openai.OpenAI, tuned: Tuned) -> None:
    events = [event.message for event in client.fine_tuning.jobs.list_events(tuned.job.id)]
    assert tuned.job.status == "succeeded", (tuned.job.error, events)
    assert tuned.cancelled.status == "cancelled" and tuned.cancelled.fine_tuned_model is None
    assert tuned.job.trained_tokens and tuned.job.finished_at and tuned.job.error is None
    assert tuned.job.fine_tuned_model is not None
    assert tuned.job.fine_tuned_model.startswith(f"ft:{BASE}:anna:tone:")
    assert {job.id for job in client.fine_tuning.jobs.list(limit=1)} == {tuned.job.id, tuned.cancelled.id}
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [tuned.job.id]
    files = {file.id: file.purpose for file in client.files.list()}
    assert files[tuned.job.training_file] == "fine-tune"
    assert client.files.content(tuned.job.training_file).read() == tuned.training


def test_events_are_paged_without_gaps(client: openai.OpenAI, tuned: Tuned) -> None:
    events = list(client.fine_tuning.jobs.list_events(tuned.job.id, limit=3))
    assert len({event.id for event in events}) == len(events) > 6
    assert [event.id for event in client.fine_tuning.jobs.list_events(tuned.job.id, limit=100)] == [
        event.id for event in events
    ]
    figures = [event.data for event in reversed(events) if event.type == "metrics"]
    steps = [found["step"] for found in figures if isinstance(found, dict)]
    assert steps == sorted(set(steps)) and steps[-1] == figures[-1]["total_steps"]  # type: ignore[index]
    for found in figures:
        assert isinstance(found, dict)
        assert found["train_loss"] > 0 and 0 <= found["train_mean_token_accuracy"] <= 1


def test_checkpoints_and_results_are_there(client: openai.OpenAI, tuned: Tuned) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(tuned.job.id, limit=1))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert len(steps) == 2 and steps == sorted(steps, reverse=True)
    assert all(checkpoint.fine_tuning_job_id == tuned.job.id for checkpoint in checkpoints)
    assert checkpoints[0].metrics.valid_loss is not None
    (result,) = tuned.job.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(result).read().decode())))
    assert int(rows[-1]["step"]) == steps[0] and float(rows[-1]["train_loss"]) > 0
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
    asked = {"prompt": "who", "max_tokens": 3, "temperature": 0}
    assert client.completions.create(model=names[-1], **asked).usage.completion_tokens > 0  # type: ignore


def test_tuned_model_chats_while_streaming(client: openai.OpenAI, tuned: Tuned) -> None:
    model = tuned.job.fine_tuned_model
    assert model is not None
    assert model in [card.id for card in client.models.list()]
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    asked: Any = {"messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(model=model, **asked)
    pieces, usage, ends = "", None, []
    with client.chat.completions.create(
        model=model, **asked, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                pieces += choice.delta.content or ""
                ends += [choice.finish_reason] if choice.finish_reason else []
            usage = chunk.usage or usage
    assert pieces == whole.choices[0].message.content
    assert ends == [whole.choices[0].finish_reason]
    assert usage is not None and usage == whole.usage
    named = client.chat.completions.create(model=model.rpartition(":")[0], **asked)
    assert named.choices[0].message.content == pieces


def test_customers_server_was_told_and_the_signature_holds(inbox: Inbox, client: openai.OpenAI, tuned: Tuned) -> None:
    def told() -> dict[str, str] | None:
        events = [client.webhooks.unwrap(body, headers, secret=tuned.secret) for headers, body in inbox.received]
        found = {event.data.id: event.type for event in events}  # type: ignore[union-attr]
        return found if len(found) == 2 else None

    assert until(told) == {
        tuned.job.id: "fine_tuning.job.succeeded",
        tuned.cancelled.id: "fine_tuning.job.cancelled",
    }
    headers, body = inbox.received[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace("fine_tuning", "fine-tuning"), headers, secret=tuned.secret)


def test_another_tenant_finds_nothing(running: Running, tuned: Tuned) -> None:
    ben = client_of(running, "ben")
    assert not [model.id for model in ben.models.list() if ":anna:" in model.id]
    assert not list(ben.files.list()) and not list(ben.fine_tuning.jobs.list())
    for asked in (
        lambda: ben.fine_tuning.jobs.retrieve(tuned.job.id),
        lambda: ben.fine_tuning.jobs.list_events(tuned.job.id),
        lambda: ben.files.retrieve(tuned.job.training_file),
        lambda: ben.models.retrieve(tuned.job.fine_tuned_model or ""),
        lambda: ben.completions.create(model=tuned.job.fine_tuned_model or "", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError):
            asked()


def test_bad_data_fail_with_the_line_at_fault(client: openai.OpenAI) -> None:
    file = client.files.create(file=("few.jsonl", examples(3) + b"{\n"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    failed = until(lambda: ended(client, job.id))
    assert failed.status == "failed" and failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "Line 4" in (failed.error.message or "")


def test_customer_without_this_project_tunes_at_home(running: Running, tmp_path: Path) -> None:
    key = running.key("ben", "offsite,inference")
    script = Path(__file__).with_name("plain_customer.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", str(script), running.url, key, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert not {"ot_ray", "serve", "jobs", "ray"} & set(answer["modules"])
    assert answer["losses"][-1] < answer["losses"][0]
    assert answer["verdict"]["state"] == "accepted", answer["verdict"]
    assert answer["verdict"]["model_id"].startswith(f"ft:{BASE}:ben:home:")
    assert answer["text"]
    ben = client_of(running, "ben")
    assert answer["verdict"]["model_id"] in [model.id for model in ben.models.list()]
