"""Fine-tuning jobs over HTTP, against a real database and store; the controller's steps are done by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from openai import BadRequestError, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from ot_ray.artifacts import BundleManifest, Releases, publish_bundle, write_bundle
from ot_ray.config import parse
from ot_ray.model import emulate
from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.catalogue.records import File
from serve.config import ServeConfig
from serve.failures import DatabaseUnavailableError
from serve.service import Service
from tests.http.tiny_service import BASE, PLAN
from tests.service.clients import ALL_SCOPES, ClientOf, new_key
from tests.service.openai_client import openai_client

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def service(settings: ServeConfig, catalogue: Catalogue, store: LocalStore) -> Service:
    """The service without engines: nothing here asks one."""
    return Service(cast("Any", None), settings, catalogue, store)


@pytest.fixture
def anna(client_of: ClientOf, released: BundleManifest) -> TestClient:
    """A client of a service with a released bundle."""
    return client_of("anna")


@pytest.fixture
def file_id(anna: TestClient, catalogue: Catalogue) -> str:
    return add_file(catalogue, "anna").id


@dataclass(frozen=True)
class Scene:
    """A service with a released bundle and one file, in which nothing may change."""

    client: TestClient
    catalogue: Catalogue
    file_id: str

    def refused(self, **changes: Any) -> dict[str, Any]:
        """The error that answers a job with these fields, none of which leaves anything behind."""
        body = json.dumps({"model": BASE, "training_file": self.file_id, **changes})
        answer = self.client.post(JOBS, content=body.encode(), headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.headers["x-should-retry"] == "false"
        assert self.catalogue.jobs.with_status("validating_files") == []
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"].isprintable()
        return error


@pytest.fixture(scope="module")
def scene(
    checkpoint: Path, bundle_folder: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    store = LocalStore(folder / "store")
    publish_bundle(store, bundle_folder)
    Releases(store, BASE).release("1")
    url = f"sqlite:///{shutil.copy(empty_database, folder / 'service.sqlite')}"
    model = {"name": BASE, "source": str(checkpoint)}
    settings = parse(ServeConfig, {"model": model, "store": store.url, "database": {"url": url}}, "test")
    catalogue = Catalogue.open(url)
    try:
        headers = {"authorization": f"Bearer {new_key(catalogue, 'anna')}"}
        api = create_api(Service(cast("Any", None), settings, catalogue, store))
        with TestClient(api, headers=headers) as client:
            yield Scene(client, catalogue, add_file(catalogue, "anna").id)
    finally:
        catalogue.close()


def add_file(catalogue: Catalogue, tenant: str, **changes: Any) -> File:
    fields = {"filename": "a.jsonl", "bytes": 10, "sha256": "a" * 64, "purpose": "fine-tune", **changes}
    file = catalogue.files.create(catalogue.tenants.named(tenant).id, **fields)
    assert file is not None
    return file


def create(client: TestClient, file_id: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json={"model": BASE, "training_file": file_id, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def queue(catalogue: Catalogue, job_id: str) -> None:
    assert catalogue.jobs.move(job_id, ("validating_files",), "queued", event="queued")


def run(catalogue: Catalogue, job_id: str) -> None:
    queue(catalogue, job_id)
    assert catalogue.jobs.move(job_id, ("queued",), "running", event="started", stage="training")


def end(catalogue: Catalogue, job_id: str, status: str, **fields: Any) -> None:
    run(catalogue, job_id)
    assert catalogue.jobs.move(job_id, ("running",), status, event=status, **fields)  # type: ignore[arg-type]


def put_into(catalogue: Catalogue, job_id: str, status: str) -> None:
    """Bring a new job into a status as the controller does."""
    if status == "queued":
        queue(catalogue, job_id)
    elif status == "paused":
        queue(catalogue, job_id)
        assert catalogue.jobs.move(job_id, ("queued",), "paused", event="paused")
    elif status == "running":
        run(catalogue, job_id)
    elif status != "validating_files":
        end(catalogue, job_id, status)


def messages(catalogue: Catalogue, job_id: str) -> list[str]:
    return [event.message for event in catalogue.events.all(job_id)]


def strictly(kind: type[Any], value: dict[str, Any]) -> Any:
    """The client's own type of an object, which must have every field that the type has, of exactly its type."""
    parsed = kind.model_validate(value, strict=True)
    assert set(kind.model_fields) <= set(value)
    return parsed


class TestCreating:
    def test_the_answer_is_openais_object_with_every_field(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, released: BundleManifest
    ) -> None:
        held_out = add_file(catalogue, "anna").id
        answer = create(
            anna,
            file_id,
            validation_file=held_out,
            suffix="my-model",
            seed=7,
            metadata={"team": "blue"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
            offsite={"tuning_method": "full"},
        )
        job = strictly(FineTuningJob, answer)
        assert (job.status, job.model, job.training_file, job.validation_file) == (
            "validating_files",
            BASE,
            file_id,
            held_out,
        )
        assert (job.seed, job.metadata, answer["user_provided_suffix"]) == (7, {"team": "blue"}, "my-model")
        asked = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
        assert answer["hyperparameters"] == answer["method"]["supervised"]["hyperparameters"] == asked
        assert answer["offsite"] == {"tuning_method": "full", "bundle_id": released.bundle_id}
        assert (job.error, job.fine_tuned_model, job.finished_at, job.trained_tokens) == (None, None, None, None)
        row = catalogue.jobs.find(job.id)
        assert row.bundle == {"model": BASE, "version": "1", "bundle_id": released.bundle_id}
        assert row.method == {"type": "supervised", "tuning_method": "full"}
        assert row.tenant_id == job.organization_id == catalogue.tenants.named("anna").id

    def test_the_least_that_may_be_sent(self, anna: TestClient, file_id: str, service: Service) -> None:
        job = create(anna, file_id, suffix=None, seed=None, metadata=None, method=None, validation_file=None)
        strictly(FineTuningJob, job)
        assert job["metadata"] is None and job["user_provided_suffix"] is None and job["validation_file"] is None
        assert set(job["hyperparameters"].values()) == {"auto"}
        assert job["offsite"]["tuning_method"] == service.settings.jobs.tuning_method

    def test_the_deprecated_place_of_hyperparameters_is_taken(self, anna: TestClient, file_id: str) -> None:
        job = create(anna, file_id, hyperparameters={"learning_rate_multiplier": 2})
        assert job["method"]["supervised"]["hyperparameters"]["learning_rate_multiplier"] == 2.0

    def test_both_places_at_once_are_refused(self, anna: TestClient, file_id: str) -> None:
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
        answer = anna.post(
            JOBS, json={"model": BASE, "training_file": file_id, "hyperparameters": {}, "method": method}
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "hyperparameters"

    def test_it_is_in_the_audit_log_and_in_the_history(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        job = create(anna, file_id)
        (line,) = catalogue.audit.list(action="job.create").items
        assert (line.target, line.tenant_id, line.outcome) == (job["id"], job["organization_id"], "ok")
        assert messages(catalogue, job["id"]) == [f"Created fine-tuning job: {job['id']}"]

    def test_the_default_seed_follows_from_what_is_tuned_on(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        first, again = create(anna, file_id)["seed"], create(anna, add_file(catalogue, "anna").id)["seed"]
        other_bytes = create(anna, add_file(catalogue, "anna", sha256="b" * 64).id)["seed"]
        other_method = create(anna, file_id, offsite={"tuning_method": "full"})["seed"]
        assert first == again and 0 <= first < 2**31
        assert len({first, other_bytes, other_method}) == 3

    @pytest.mark.parametrize(
        ("change", "param", "says"),
        [
            ({"model": "gpt-4o-mini"}, "model", f"use `{BASE}`"),
            ({"model": f"ft:{BASE}:anna:x:0123456789ab"}, "model", "tuned already"),
            ({"model": None}, "model", "Missing"),
            ({"training_file": None}, "training_file", "Missing"),
            ({"training_file": "file-0"}, "training_file", "does not exist"),
            ({"training_file": "\x00"}, "training_file", "does not exist"),
            ({"training_file": "../../etc/passwd"}, "training_file", "does not exist"),
            ({"training_file": 3}, "training_file", "string"),
            ({"validation_file": "file-0"}, "validation_file", "does not exist"),
            ({"seed": -1}, "seed", "greater than or equal to 0"),
            ({"seed": 2**31}, "seed", "less than"),
            ({"seed": 1.5}, "seed", "integer"),
            ({"seed": True}, "seed", "integer"),
            ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
            ({"metadata": {"k" * 65: "x"}}, "metadata", "1 to 64"),
            ({"metadata": {"": "x"}}, "metadata", "1 to 64"),
            ({"metadata": {"k": "x" * 513}}, "metadata", "at most 512"),
            ({"metadata": {"k": 1}}, "metadata", "must be text"),
            ({"metadata": {"k": "\x00"}}, "metadata", "NUL"),
            ({"metadata": []}, "metadata", "object"),
            ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method", "dpo is not offered"),
            ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method", "reinforcement is not offered"),
            ({"method": {"type": "magic"}}, "method", "supervised"),
            ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "Unrecognized"),
            ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters", "from 1 to 50"),
            ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters", "from 1 to 50"),
            ({"hyperparameters": {"n_epochs": True}}, "hyperparameters", "from 1 to 50"),
            ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters", "from 1 to 50"),
            ({"hyperparameters": {"batch_size": 257}}, "hyperparameters", "from 1 to 256"),
            ({"hyperparameters": {"batch_size": 10**400}}, "hyperparameters", "from 1 to 256"),
            ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters", "above 0"),
            ({"hyperparameters": {"learning_rate_multiplier": 10**400}}, "hyperparameters", "above 0"),
            ({"hyperparameters": {"lr": 1}}, "hyperparameters.lr", "Unrecognized"),
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "no integrations"),
            ({"offsite": {"tuning_method": "prefix"}}, "offsite", "lora"),
            ({"surprise": 1}, "surprise", "Unrecognized"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(
        self, scene: Scene, change: dict[str, Any], param: str, says: str
    ) -> None:
        error = scene.refused(**change)
        assert error["param"] == param and says in error["message"], error

    @pytest.mark.parametrize(
        "suffix",
        [
            "",
            "a" * 65,
            "a b",
            "a/b",
            "..",
            "../x",
            "a:b",
            "-a",
            ".a",
            "a\n",
            "a\x00b",
            "a\u200bb",  # zero-width space
            "\u202etset",  # right-to-left override
            "\uff41",  # NFKC makes an a of it
            "\u2024",  # and a dot of this one
            "\u0430",  # Cyrillic a
            "a\u0301",
            "\U0001f600",
            "ﬁne",
        ],
    )
    def test_a_suffix_is_plain_ascii(self, scene: Scene, suffix: str) -> None:
        error = scene.refused(suffix=suffix)
        assert error["param"] == "suffix" and "letters A-Z" in error["message"]

    @pytest.mark.parametrize("field", ["suffix", "model", "training_file", "metadata"])
    def test_half_a_surrogate_pair_is_no_text(self, scene: Scene, field: str) -> None:
        assert scene.refused(**{field: {"k": "\ud800"} if field == "metadata" else "\ud800"})["message"]

    @pytest.mark.parametrize("changes", [{"purpose": "fine-tune-results"}, {"status": "error"}])
    def test_a_file_that_is_not_for_tuning(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, changes: dict[str, str]
    ) -> None:
        other = add_file(catalogue, "anna", **changes).id
        answer = anna.post(JOBS, json={"model": BASE, "training_file": file_id, "validation_file": other})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "validation_file"

    def test_without_a_release_there_is_nothing_to_tune(self, client_of: ClientOf, catalogue: Catalogue) -> None:
        client = client_of("anna")
        answer = client.post(JOBS, json={"model": BASE, "training_file": add_file(catalogue, "anna").id})
        assert answer.status_code == 400 and "no bundle" in answer.json()["error"]["message"]

    def test_the_owner_says_which_methods_it_takes(
        self, client_of: ClientOf, catalogue: Catalogue, service: Service, base: Any, tokenizer: Any, tmp_path: Any
    ) -> None:
        assert service.store is not None
        write_bundle(
            tmp_path / "bundle",
            emulate(base, PLAN, [0, 3]),
            tokenizer,
            PLAN,
            name=BASE,
            version="2",
            card="# A tiny model\n",
            recommended={},
            methods=("full",),
        )
        publish_bundle(service.store, tmp_path / "bundle")
        Releases(service.store, BASE).release("2")
        client = client_of("anna")
        body = {"model": BASE, "training_file": add_file(catalogue, "anna").id}
        refused = client.post(JOBS, json={**body, "offsite": {"tuning_method": "bitfit"}})
        assert refused.status_code == 400 and "full" in refused.json()["error"]["message"]
        assert client.post(JOBS, json={**body, "offsite": {"tuning_method": "full"}}).status_code == 200


class TestLimits:
    @pytest.fixture
    def database_url(self, any_database_url: str) -> str:
        return any_database_url

    def test_a_full_queue_answers_429_until_a_job_leaves_it(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"queued_jobs": 2})
        job = create(anna, file_id)
        create(anna, file_id)
        answer = anna.post(JOBS, json={"model": BASE, "training_file": file_id})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) > 0 and "x-should-retry" not in answer.headers
        run(catalogue, job["id"])
        create(anna, file_id)

    def test_paused_jobs_take_room_in_the_queue(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"queued_jobs": 2})
        for _ in range(2):
            put_into(catalogue, create(anna, file_id)["id"], "paused")
        answer = anna.post(JOBS, json={"model": BASE, "training_file": file_id})
        assert answer.status_code == 429 and "paused" in answer.json()["error"]["message"]

    def test_jobs_resumed_at_the_same_time_do_not_slip_through(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        jobs = [create(anna, file_id)["id"] for _ in range(6)]
        for job in jobs:
            put_into(catalogue, job, "paused")
        catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"queued_jobs": 2})
        with ThreadPoolExecutor(6) as threads:
            codes = sorted(threads.map(lambda job: anna.post(f"{JOBS}/{job}/resume").status_code, jobs))
        assert codes == [200] * 2 + [429] * 4 and len(catalogue.jobs.with_status("queued")) == 2

    def test_requests_at_the_same_time_do_not_slip_through(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"queued_jobs": 3})

        def attempt(_: int) -> int:
            return anna.post(JOBS, json={"model": BASE, "training_file": file_id}).status_code

        with ThreadPoolExecutor(8) as threads:
            codes = sorted(threads.map(attempt, range(8)))
        assert codes == [200] * 3 + [429] * 5
        assert len(catalogue.jobs.with_status("validating_files")) == 3

    def test_tokens_of_the_day_that_are_used_up(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        tenant = catalogue.tenants.named("anna").id
        catalogue.tenants.change_limits(tenant, {"tokens_per_day": 1000})
        assert catalogue.counts.take_tokens(tenant, 999, 1000)
        create(anna, file_id)
        assert catalogue.counts.take_tokens(tenant, 1, 1000)
        answer = anna.post(JOBS, json={"model": BASE, "training_file": file_id})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(answer.headers["retry-after"]) <= 24 * 3600


class TestReading:
    def test_numbers_take_the_place_of_auto_once_they_are_known(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        job = create(anna, file_id, hyperparameters={"n_epochs": 4})
        numbers = {"n_epochs": 4, "batch_size": 1, "learning_rate_multiplier": 1.0}
        catalogue.jobs.move(
            job["id"],
            ("validating_files",),
            "queued",
            event="queued",
            resolved={**numbers, "learning_rate": 2e-4, "tuning_method": "lora"},
        )
        answer = anna.get(f"{JOBS}/{job['id']}").json()
        strictly(FineTuningJob, answer)
        assert answer["hyperparameters"] == answer["method"]["supervised"]["hyperparameters"] == numbers

    def test_a_job_that_succeeded(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        job = create(anna, file_id)
        model = f"ft:{BASE}:anna:x:0123456789ab"
        fields = {"fine_tuned_model": model, "trained_tokens": 99, "result_files": ["file-1"], "estimated_finish": 9}
        end(catalogue, job["id"], "succeeded", **fields)
        answer = anna.get(f"{JOBS}/{job['id']}").json()
        parsed = strictly(FineTuningJob, answer)
        assert (parsed.status, parsed.fine_tuned_model, parsed.trained_tokens) == ("succeeded", model, 99)
        assert parsed.result_files == ["file-1"] and parsed.finished_at is not None
        assert parsed.error is None and parsed.estimated_finish is None

    def test_a_job_that_failed(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        job = create(anna, file_id)
        error = {"code": "invalid_training_file", "message": "Line 3: no.", "param": "training_file"}
        end(catalogue, job["id"], "failed", error=error)
        answer = anna.get(f"{JOBS}/{job['id']}").json()
        assert strictly(FineTuningJob, answer).error.model_dump() == error

    def test_pages_of_jobs(self, anna: TestClient, file_id: str, client_of: ClientOf, catalogue: Catalogue) -> None:
        ids = [create(anna, file_id)["id"] for _ in range(5)]
        client_of("ben")
        create(client_of("ben"), add_file(catalogue, "ben").id)
        first = anna.get(JOBS, params={"limit": 2}).json()
        assert [job["id"] for job in first["data"]] == ids[:2:-1]
        assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, ids[3])
        assert [job.id for job in openai_client(anna).fine_tuning.jobs.list(limit=2)] == ids[::-1]
        assert anna.get(JOBS, params={"after": ids[0]}).json()["data"] == []

    @pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"limit": "x"}, {"metadata": "x"}])
    def test_queries_that_mean_nothing(self, anna: TestClient, query: dict[str, str]) -> None:
        answer = anna.get(JOBS, params=query)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(query))

    @pytest.mark.parametrize("after", ["ftjob-0", "\x00", "' OR 1=1 --"])
    def test_an_unknown_place_in_the_list(self, anna: TestClient, file_id: str, after: str) -> None:
        job = create(anna, file_id)["id"]
        for path in (JOBS, f"{JOBS}/{job}/events", f"{JOBS}/{job}/checkpoints"):
            answer = anna.get(path, params={"after": after})
            assert answer.status_code == 404 and answer.json()["error"]["param"] == "after"

    def test_events_newest_first_in_pages(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        job = create(anna, file_id)["id"]
        run(catalogue, job)
        figures = {"step": 1, "train_loss": 2.5, "valid_loss": None}
        catalogue.events.add(job, "Step 1/9: training loss=2.50", type="metrics", data=figures)
        catalogue.events.add(job, "Something odd", level="warn")
        answer = anna.get(f"{JOBS}/{job}/events", params={"limit": 2}).json()
        odd, metrics = (strictly(FineTuningJobEvent, event) for event in answer["data"])
        assert (odd.level, odd.type, odd.message, odd.data) == ("warn", "message", "Something odd", {})
        assert (metrics.type, metrics.data) == ("metrics", figures) and answer["has_more"]
        listed = openai_client(anna).fine_tuning.jobs.list_events(job, limit=2)
        assert [event.message for event in listed][::-1] == messages(catalogue, job)

    def test_checkpoints_latest_first_in_pages(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        job = create(anna, file_id)
        for step in (10, 20, 30):
            catalogue.checkpoints.add(
                job["organization_id"],
                job["id"],
                step_number=step,
                metrics={"train_loss": 1.5, "full_valid_loss": 2.0},
                fine_tuned_model_checkpoint=f"ft:{BASE}:anna:x-{step}:0123456789ab",
            )
        answer = anna.get(f"{JOBS}/{job['id']}/checkpoints", params={"limit": 1}).json()
        (latest,) = (strictly(FineTuningJobCheckpoint, item) for item in answer["data"])
        assert latest.step_number == 30 and latest.metrics.step == 30 and latest.metrics.full_valid_loss == 2.0
        assert latest.metrics.valid_loss is None and latest.fine_tuning_job_id == job["id"]
        listed = openai_client(anna).fine_tuning.jobs.checkpoints.list(job["id"], limit=1)
        assert [item.step_number for item in listed] == [30, 20, 10]


class TestOtherTenants:
    def test_anothers_job_is_as_unknown_as_none(
        self, anna: TestClient, file_id: str, client_of: ClientOf, catalogue: Catalogue
    ) -> None:
        job, ben = create(anna, file_id)["id"], client_of("ben")
        nobodys = "ftjob-" + "0" * 24
        for method, path in [
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/checkpoints"),
            ("POST", "/cancel"),
            ("POST", "/pause"),
            ("POST", "/resume"),
        ]:
            theirs, none = (ben.request(method, f"{JOBS}/{one}{path}") for one in (job, nobodys))
            assert theirs.status_code == none.status_code == 404
            assert theirs.text.replace(job, nobodys) == none.text
            assert theirs.json()["error"]["code"] == "fine_tune_not_found"
        assert ben.get(JOBS, params={"after": job}).status_code == 404
        assert catalogue.jobs.find(job).status == "validating_files"

    def test_anothers_file_is_as_unknown_as_none(
        self, anna: TestClient, file_id: str, client_of: ClientOf, catalogue: Catalogue
    ) -> None:
        ben, nobodys = client_of("ben"), "file-" + "0" * 24
        theirs, none = (ben.post(JOBS, json={"model": BASE, "training_file": one}) for one in (file_id, nobodys))
        assert theirs.status_code == none.status_code == 400
        assert theirs.text.replace(file_id, nobodys) == none.text

    @pytest.mark.parametrize("path", ["", "/x", "/x/events", "/x/checkpoints"])
    def test_a_key_without_the_scope(self, client_of: ClientOf, path: str) -> None:
        client = client_of("anna", scopes=[scope for scope in ALL_SCOPES if scope != "jobs"])
        assert client.get(JOBS + path).status_code == 403
        assert client_of(None).get(JOBS + path).status_code == 401

    @pytest.mark.parametrize("job_id", ["%00", "%FF", "x" * 5000, "..%2F..", "%F0%9F%98%80"])
    def test_ids_that_are_none(self, anna: TestClient, job_id: str) -> None:
        answer = anna.get(f"{JOBS}/{job_id}")
        assert answer.status_code == 404 and len(answer.json()["error"]["message"]) < 400


class TestChanging:
    @pytest.mark.parametrize("status", ["validating_files", "queued", "paused"])
    def test_a_waiting_job_is_cancelled_at_once(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, status: str
    ) -> None:
        job = create(anna, file_id)
        catalogue.webhooks.create(job["organization_id"], "https://x.example/", ["fine_tuning.job.cancelled"])
        put_into(catalogue, job["id"], status)
        answers = [anna.post(f"{JOBS}/{job['id']}/cancel") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        cancelled = strictly(FineTuningJob, answers[0].json())
        assert cancelled.status == "cancelled" and cancelled.finished_at is not None
        assert answers[0].json() == answers[1].json()
        assert messages(catalogue, job["id"]).count("The fine-tuning job was cancelled") == 1
        (delivery,) = catalogue.webhooks.deliveries(job["organization_id"])
        assert delivery.payload["type"] == "fine_tuning.job.cancelled"
        assert delivery.payload["data"] == {"id": job["id"]}

    def test_a_running_job_is_cancelled_by_the_controller(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        job = create(anna, file_id)["id"]
        run(catalogue, job)
        assert anna.post(f"{JOBS}/{job}/cancel").json()["status"] == "running"
        assert catalogue.jobs.find(job).wanted == "cancel"
        for other in ("pause", "resume"):
            answer = anna.post(f"{JOBS}/{job}/{other}")
            assert answer.status_code == 400 and "being cancelled" in answer.json()["error"]["message"]
        assert catalogue.jobs.find(job).wanted == "cancel"

    @pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
    @pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
    def test_what_has_ended_stays_as_it_ended(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, status: str, action: str
    ) -> None:
        job = create(anna, file_id)["id"]
        end(catalogue, job, status)
        before = catalogue.jobs.find(job)
        answer = anna.post(f"{JOBS}/{job}/{action}")
        if (status, action) == ("cancelled", "cancel"):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 400 and answer.headers["x-should-retry"] == "false"
            assert f"'{status}'" in answer.json()["error"]["message"]
            with pytest.raises(BadRequestError):
                getattr(openai_client(anna).fine_tuning.jobs, action)(job)
        assert catalogue.jobs.find(job) == before

    def test_pausing_and_resuming(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        client, job = openai_client(anna), create(anna, file_id)["id"]
        queue(catalogue, job)
        assert client.fine_tuning.jobs.pause(job).status == "paused"
        assert client.fine_tuning.jobs.pause(job).status == "paused"
        assert messages(catalogue, job).count("The fine-tuning job was paused") == 1
        assert client.fine_tuning.jobs.resume(job).status == "queued"
        assert client.fine_tuning.jobs.resume(job).status == "queued"
        assert sum("resumed" in message for message in messages(catalogue, job)) == 1
        assert catalogue.jobs.find(job).queued_at is not None

    @pytest.mark.parametrize("status", ["validating_files", "running"])
    def test_the_controller_pauses_what_it_has_in_hand(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, status: str
    ) -> None:
        job = create(anna, file_id)["id"]
        put_into(catalogue, job, status)
        assert anna.post(f"{JOBS}/{job}/pause").json()["status"] == status
        assert catalogue.jobs.find(job).wanted == "pause"
        assert anna.post(f"{JOBS}/{job}/resume").json()["status"] == status
        assert catalogue.jobs.find(job).wanted == "run"

    def test_a_full_queue_takes_no_paused_job_back(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        job = create(anna, file_id)["id"]
        put_into(catalogue, job, "paused")
        create(anna, file_id)
        catalogue.tenants.change_limits(catalogue.tenants.named("anna").id, {"queued_jobs": 1})
        answer = anna.post(f"{JOBS}/{job}/resume")
        assert answer.status_code == 429 and catalogue.jobs.find(job).status == "paused"

    @pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
    def test_changes_are_in_the_audit_log(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, action: str
    ) -> None:
        job = create(anna, file_id)["id"]
        assert anna.post(f"{JOBS}/{job}/{action}").status_code == 200
        assert [line.target for line in catalogue.audit.list(action=f"job.{action}").items] == [job]


class TestBothDatabases:
    @pytest.fixture
    def database_url(self, any_database_url: str) -> str:
        return any_database_url

    def test_jobs_by_metadata(self, anna: TestClient, file_id: str) -> None:
        strange = 'a"]\\[%_\u00fc'
        both = create(anna, file_id, metadata={"team": "blue", strange: "\U0001f600"})["id"]
        blue = create(anna, file_id, metadata={"team": "blue"})["id"]
        empty = create(anna, file_id, metadata={"team": ""})["id"]
        none = create(anna, file_id)["id"]

        def found(**query: Any) -> list[str]:
            return [job.id for job in openai_client(anna).fine_tuning.jobs.list(**query)]

        assert found(metadata={"team": "blue"}) == [blue, both]
        assert found(metadata={"team": "blue", strange: "\U0001f600"}) == [both]
        assert found(metadata={"team": ""}) == [empty]
        assert found(metadata={"team": "%"}) == found(metadata={"other": "blue"}) == []
        assert found(extra_query={"metadata": "null"}) == [none]

    def test_of_many_that_change_a_job_at_once_one_ends_it(
        self, anna: TestClient, file_id: str, catalogue: Catalogue
    ) -> None:
        job = create(anna, file_id)
        catalogue.webhooks.create(job["organization_id"], "https://x.example/", ["fine_tuning.job.cancelled"])
        queue(catalogue, job["id"])

        def act(action: str) -> int:
            return anna.post(f"{JOBS}/{job['id']}/{action}").status_code

        with ThreadPoolExecutor(6) as threads:
            codes = list(threads.map(act, ["pause", "cancel", "resume", "cancel", "pause", "cancel"]))
        assert set(codes) <= {200, 400}
        assert catalogue.jobs.find(job["id"]).status == "cancelled"
        assert messages(catalogue, job["id"])[-1] == "The fine-tuning job was cancelled"
        assert messages(catalogue, job["id"]).count("The fine-tuning job was cancelled") == 1
        assert len(catalogue.webhooks.deliveries(job["organization_id"])) == 1


class TestRepeating:
    def test_the_same_key_makes_one_job(self, anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
        body = {"model": BASE, "training_file": file_id}
        first, second = (anna.post(JOBS, json=body, headers={"idempotency-key": "k1"}) for _ in range(2))
        assert first.json() == second.json() and second.headers["idempotency-replayed"] == "true"
        other = anna.post(JOBS, json={**body, "seed": 1}, headers={"idempotency-key": "k1"})
        assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
        assert len(catalogue.jobs.with_status("validating_files")) == 1

    def test_a_job_whose_answer_was_lost_is_found_though_its_file_is_gone(
        self, anna: TestClient, file_id: str, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body, headers = {"model": BASE, "training_file": file_id}, {"idempotency-key": "k1"}
        leave = catalogue.idempotency.leave

        def die(tenant_id: str, key: str, holder: str, *_: object) -> None:
            leave(tenant_id, key, holder)
            raise DatabaseUnavailableError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(catalogue.idempotency, "finish", die)
            assert anna.post(JOBS, json=body, headers=headers).status_code == 503
        (made,) = catalogue.jobs.with_status("validating_files")
        assert anna.delete(f"/v1/files/{file_id}").status_code == 200
        again = anna.post(JOBS, json=body, headers=headers)
        assert again.status_code == 200 and again.json()["id"] == made.id
        assert catalogue.jobs.with_status("validating_files") == [made]


def test_the_openai_client_from_beginning_to_end(anna: TestClient, file_id: str, catalogue: Catalogue) -> None:
    client: OpenAI = openai_client(anna)
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        suffix="blue",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 4}}},
        metadata={"team": "blue"},
        extra_body={"offsite": {"tuning_method": "bitfit"}},
    )
    assert job.status == "validating_files" and client.fine_tuning.jobs.retrieve(job.id) == job
    run(catalogue, job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert client.fine_tuning.jobs.cancel(job.id).status == "running"
    assert catalogue.jobs.move(
        job.id,
        ("running",),
        "cancelled",
        event="The fine-tuning job was cancelled",
        deliver="fine_tuning.job.cancelled",
    )
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
