"""Webhooks: endpoints over HTTP, and deliveries to a real server, verified by OpenAI's own client."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi.testclient import TestClient
from openai import BadRequestError, InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import (
    DeletedWebhookEndpoint,
    WebhookEndpoint,
    WebhookEndpointTestResult,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
)

from ot_ray.errors import ConfigError
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue, schema
from serve.catalogue.records import Delivery, Webhook
from serve.config import ServeConfig
from serve.controller.webhooks import Deliverer, pause_s
from serve.failures import DatabaseUnavailableError
from serve.outbound import OutboundError, post
from serve.service import Service
from serve.webhook_requests import signature
from serve.wire.webhooks import WebhookConfig, forbidden_address, url_problem
from tests.service.clients import ClientOf
from tests.service.openai_client import openai_client
from tests.service.webhook_receiver import Receiver, receiver

ENDPOINTS = "/v1/webhook_endpoints"
GOOD = {"url": "https://hooks.example/", "name": "mine", "event_types": ["fine_tuning.job.failed"]}
SUCCEEDED, FAILED = "fine_tuning.job.succeeded", "fine_tuning.job.failed"
LOCAL = WebhookConfig(allow_http=True, allow_private=True, timeout_s=60)
HASTY = LOCAL.model_copy(update={"timeout_s": 0.5})
VERIFIER = OpenAI(api_key="none")


class Clock:
    """A time of day that stands still until a test moves it on."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalogue(database_url: str, clock: Clock) -> Iterator[Catalogue]:
    opened = Catalogue.open(database_url, clock)
    yield opened
    opened.close()


@pytest.fixture
def service(settings: ServeConfig, catalogue: Catalogue, store: LocalStore) -> Service:
    """The service without engines: nothing here asks one."""
    return Service(cast("Any", None), settings, catalogue, store)


@pytest.fixture
def tenant(catalogue: Catalogue) -> str:
    return catalogue.tenants.create("anna").id


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiver() as scene:
        yield scene


@pytest.fixture
def deliverer(catalogue: Catalogue, clock: Clock) -> Iterator[Deliverer]:
    made = Deliverer(catalogue, LOCAL, clock=clock)
    yield made
    made.close()


def endpoint(catalogue: Catalogue, tenant_id: str, url: str, *events: str) -> Webhook:
    webhook = catalogue.webhooks.create(tenant_id, url, events or (SUCCEEDED, FAILED))
    assert webhook is not None
    return webhook


def end_a_job(catalogue: Catalogue, tenant_id: str, type: str = SUCCEEDED) -> str:
    """Create a job and end it as the controller does; its id."""
    job = catalogue.jobs.create(
        tenant_id,
        model="tiny",
        bundle={},
        training_file="file-0",
        seed=0,
        method={"tuning_method": "full"},
        hyperparameters={},
    )
    assert job is not None
    status = type.rpartition(".")[2]
    assert catalogue.jobs.move(job.id, ("validating_files",), status, event="ended", deliver=type)  # type: ignore[arg-type]
    return job.id


def deliver(deliverer: Deliverer, clock: Clock) -> int:
    begun = deliverer.run_due(clock())
    assert deliverer.wait(120)
    return begun


def only(catalogue: Catalogue, tenant_id: str) -> Delivery:
    (delivery,) = catalogue.webhooks.deliveries(tenant_id)
    return delivery


class TestSigning:
    def test_the_example_of_standard_webhooks(self) -> None:
        # The published example of the Standard Webhooks libraries.
        secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
        found = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
        assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

    def test_the_openai_client_takes_what_arrives_and_nothing_else(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        webhook = endpoint(catalogue, tenant, there.url("/hook?a=b"))
        job_id = end_a_job(catalogue, tenant)
        assert deliver(deliverer, clock) == 1
        ((headers, body),) = there.at("/hook?a=b")
        event = VERIFIER.webhooks.unwrap(body, headers, secret=webhook.secret)
        assert (event.type, event.object) == (SUCCEEDED, "event")
        assert event.data.id == job_id and event.id == headers["webhook-id"]  # type: ignore[union-attr]
        assert set(json.loads(body)) == {"id", "object", "type", "created_at", "data"}
        assert event.created_at == only(catalogue, tenant).created_at
        assert headers["content-type"] == "application/json"
        assert headers["host"] == f"127.0.0.1:{there.port}"
        other = endpoint(catalogue, tenant, there.url("/other")).secret
        for wrong_body, wrong_secret in ((body, other), (body + b" ", webhook.secret)):
            with pytest.raises(InvalidWebhookSignatureError):
                VERIFIER.webhooks.unwrap(wrong_body, headers, secret=wrong_secret)
        with pytest.raises(InvalidWebhookSignatureError):
            VERIFIER.webhooks.unwrap(body, {**headers, "webhook-id": "evt_0"}, secret=webhook.secret)


class TestDelivering:
    @pytest.fixture
    def database_url(self, any_database_url: str) -> str:
        """Both databases: what is due and who has it is theirs to say."""
        return any_database_url

    def test_what_was_taken_is_not_sent_again(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        endpoint(catalogue, tenant, there.url("/a"), SUCCEEDED)
        endpoint(catalogue, tenant, there.url("/b"), FAILED)
        end_a_job(catalogue, tenant)
        assert deliver(deliverer, clock) == 1
        clock.now += 100 * 3600
        assert deliver(deliverer, clock) == 0
        assert len(there.at("/a")) == 1 and there.at("/b") == []
        delivery = only(catalogue, tenant)
        assert delivery.delivered_at is not None and delivery.attempts == 1 and delivery.failed_at is None

    def test_each_kind_of_end_is_told(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        kinds = [SUCCEEDED, FAILED, "fine_tuning.job.cancelled"]
        webhook = endpoint(catalogue, tenant, there.url("/a"), *kinds)
        for kind in kinds:
            end_a_job(catalogue, tenant, kind)
            assert deliver(deliverer, clock) == 1
        events = [VERIFIER.webhooks.unwrap(body, headers, secret=webhook.secret) for headers, body in there.at("/a")]
        assert [event.type for event in events] == kinds and len({event.id for event in events}) == 3

    def test_it_is_tried_again_under_the_same_id_until_it_is_taken(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        webhook = endpoint(catalogue, tenant, there.url("/a"))
        there.answers["/a"] = [500, 404, 204]
        end_a_job(catalogue, tenant)
        for attempt in (1, 2):
            assert deliver(deliverer, clock) == 1
            assert deliver(deliverer, clock) == 0, "before its pause is over"
            waits = only(catalogue, tenant)
            assert waits.attempts == attempt and waits.last_error == f"answered {(500, 404)[attempt - 1]}"
            clock.now += pause_s(LOCAL, attempt) + 1
        assert deliver(deliverer, clock) == 1
        # A signature holds for five minutes by the receiver's clock, so each try has its own.
        assert len({headers["webhook-id"] for headers, _ in there.at("/a")}) == 1
        assert len({headers["webhook-timestamp"] for headers, _ in there.at("/a")}) == 3
        for headers, body in there.at("/a"):
            assert VERIFIER.webhooks.unwrap(body, headers, secret=webhook.secret).type == SUCCEEDED
        assert only(catalogue, tenant).delivered_at is not None

    def test_it_is_given_up_after_72_hours(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        endpoint(catalogue, tenant, there.url("/status/503"))
        end_a_job(catalogue, tenant)
        tries = 0
        while (delivery := only(catalogue, tenant)).failed_at is None:
            assert delivery.next_at is not None and tries < 100
            clock.now += max(0, delivery.next_at - clock.now) + 1
            assert deliver(deliverer, clock) == 1
            tries += 1
        assert delivery.next_at is None and delivery.attempts == tries == len(there.received)
        assert 66 * 3600 < delivery.failed_at - delivery.created_at <= 72 * 3600
        clock.now += 100 * 3600
        assert deliver(deliverer, clock) == 0

    def test_pauses_double_up_to_the_longest(self) -> None:
        assert [pause_s(LOCAL, attempt) for attempt in (1, 2, 3, 4)] == [5, 10, 20, 40]
        assert pause_s(LOCAL, 40) == pause_s(LOCAL, 10**6) == 6 * 3600

    def test_an_endpoint_that_hangs_holds_up_no_other(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        for _ in range(LOCAL.concurrent + 1):
            endpoint(catalogue, tenant, there.url("/hang"))
        other = catalogue.tenants.create("ben").id
        endpoint(catalogue, other, there.url("/a"))
        end_a_job(catalogue, tenant)
        end_a_job(catalogue, other)
        clock.now += 1
        deliverer.run_due(clock())
        deadline = time.monotonic() + 120
        while only(catalogue, other).delivered_at is None:
            assert time.monotonic() < deadline
            deliverer.run_due(clock())
            time.sleep(0.01)
        hanging = catalogue.webhooks.deliveries(tenant)
        assert all(delivery.delivered_at is None for delivery in hanging)
        assert 0 < sum(delivery.attempts for delivery in hanging) <= LOCAL.concurrent // 2
        there.over.set()

    def test_one_endpoint_gets_one_at_a_time(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        endpoint(catalogue, tenant, there.url("/hang"))
        end_a_job(catalogue, tenant)
        end_a_job(catalogue, tenant)
        assert deliverer.run_due(clock() + 1) == 1
        assert deliverer.run_due(clock() + 1) == 0
        there.over.set()
        assert deliverer.wait(120)
        assert deliverer.run_due(clock() + 1) == 1

    def test_of_two_deliverers_one_tries_it(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        endpoint(catalogue, tenant, there.url("/a"))
        end_a_job(catalogue, tenant)
        ((delivery, _),) = catalogue.webhooks.due(catalogue.now())
        assert catalogue.webhooks.claim(delivery, catalogue.now() + 60) == 1
        assert catalogue.webhooks.claim(delivery, catalogue.now() + 60) is None
        assert deliver(deliverer, clock) == 0
        # The one that claimed it was killed: when its claim has run out, another tries it under the same id.
        clock.now += 61
        assert deliver(deliverer, clock) == 1
        ((headers, _),) = there.at("/a")
        assert headers["webhook-id"] == delivery.id and only(catalogue, tenant).attempts == 2

    def test_a_late_failure_does_not_undo_a_later_success(self, catalogue: Catalogue, tenant: str) -> None:
        endpoint(catalogue, tenant, "https://hooks.example/")
        end_a_job(catalogue, tenant)
        ((delivery, _),) = catalogue.webhooks.due(catalogue.now())
        first = catalogue.webhooks.claim(delivery, catalogue.now())
        ((again, _),) = catalogue.webhooks.due(catalogue.now())
        second = catalogue.webhooks.claim(again, catalogue.now() + 60)
        assert (first, second) == (1, 2)
        catalogue.webhooks.delivered(delivery.id, 2)
        catalogue.webhooks.not_delivered(delivery.id, 1, catalogue.now() + 5, "no answer")
        assert only(catalogue, tenant).delivered_at is not None and only(catalogue, tenant).next_at is None

    def test_what_was_settled_long_ago_is_swept_and_nothing_else(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        kept, gone = endpoint(catalogue, tenant, there.url("/a")), endpoint(catalogue, tenant, there.url("/status/503"))
        end_a_job(catalogue, tenant)
        deliver(deliverer, clock)
        deliver(deliverer, clock)
        clock.now += 1000
        due = end_a_job(catalogue, tenant)
        catalogue.webhooks.disable(tenant, gone.id)
        catalogue.webhooks.sweep(1001)
        assert len(catalogue.webhooks.deliveries(tenant)) == 4
        catalogue.webhooks.sweep(1000)
        assert [item.delivered_at is None for item in catalogue.webhooks.deliveries(tenant)] == [True] * 3
        clock.now += 1000
        catalogue.webhooks.sweep(1000)
        (left,) = catalogue.webhooks.deliveries(tenant)
        assert (left.object_id, left.webhook_id) == (due, kept.id) and left.next_at is not None, "it is due"
        with catalogue._database.read() as connection:
            assert connection.execute(sa.select(schema.webhooks.c.id)).scalars().all() == [kept.id]
        assert deliver(deliverer, clock) == 1
        clock.now += LOCAL.keep_s
        deliverer.sweep()
        assert catalogue.webhooks.deliveries(tenant) == [] and catalogue.webhooks.get(tenant, kept.id) == kept

    def test_a_removed_endpoint_gets_nothing_more(
        self, catalogue: Catalogue, tenant: str, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        webhook = endpoint(catalogue, tenant, there.url("/a"))
        end_a_job(catalogue, tenant)
        catalogue.webhooks.disable(tenant, webhook.id)
        end_a_job(catalogue, tenant)
        clock.now += 3600
        assert deliver(deliverer, clock) == 0 and there.received == []
        assert only(catalogue, tenant).failed_at is not None


class TestPosting:
    @pytest.mark.parametrize("path", ["/hang", "/drip"])
    def test_what_never_answers(self, there: Receiver, path: str) -> None:
        with pytest.raises(OutboundError, match=r"no answer within 0\.5 seconds"):
            post(there.url(path), {}, b"{}", HASTY)

    def test_what_speaks_something_else(self, there: Receiver) -> None:
        with pytest.raises(OutboundError, match="does not speak HTTP"):
            post(there.url("/garbage"), {}, b"{}", LOCAL)

    def test_a_head_without_end(self, there: Receiver) -> None:
        with pytest.raises(OutboundError, match=r"does not speak HTTP|has no end"):
            post(there.url("/flood"), {}, b"{}", LOCAL)

    def test_redirects_are_not_followed(self, there: Receiver) -> None:
        assert post(there.url("/redirect"), {}, b"{}", LOCAL) == 307
        assert there.at("/elsewhere") == []

    def test_nobody_listens(self, there: Receiver) -> None:
        with receiver() as gone:
            url = gone.url("/")
        with pytest.raises(OutboundError, match="cannot connect"):
            post(url, {}, b"{}", LOCAL)

    def test_a_name_is_resolved_once_and_the_connection_goes_there(self, there: Receiver) -> None:
        asked: list[tuple[str, int]] = []

        def resolver(host: str, port: int) -> list[str]:
            asked.append((host, port))
            return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

        assert post(there.url("/a", "hooks.example"), {}, b"{}", LOCAL, resolver) == 200
        assert asked == [("hooks.example", there.port)]
        ((headers, _),) = there.at("/a")
        assert headers["host"] == f"hooks.example:{there.port}"

    @pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.1.2.3"], ["8.8.8.8", "169.254.169.254"], ["::1"]])
    def test_names_of_inner_addresses_are_not_called(self, there: Receiver, addresses: list[str]) -> None:
        public = LOCAL.model_copy(update={"allow_private": False})
        with pytest.raises(OutboundError, match="not on the public internet"):
            post(there.url("/a", "hooks.example"), {}, b"{}", public, lambda host, port: addresses)
        assert there.received == []

    @pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost."])
    def test_other_ways_to_write_this_machine(self, there: Receiver, host: str) -> None:
        with pytest.raises(OutboundError, match=r"not on the public internet|cannot be resolved"):
            post(there.url("/a", host), {}, b"{}", LOCAL.model_copy(update={"allow_private": False}))
        assert there.received == []

    @pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b"])
    def test_names_that_are_none(self, host: str) -> None:
        with pytest.raises(OutboundError, match="cannot be resolved"):
            post(f"http://{host}/", {}, b"{}", LOCAL)

    def test_a_name_that_nobody_knows(self) -> None:
        def resolver(host: str, port: int) -> list[str]:
            raise socket.gaierror(socket.EAI_NONAME, "no such host")

        with pytest.raises(OutboundError, match="cannot be resolved"):
            post("http://hooks.example/", {}, b"{}", LOCAL, resolver)


class TestTls:
    @pytest.fixture(scope="class")
    def certificate(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """A certificate of `hooks.example` that signs itself, and its key."""
        folder = tmp_path_factory.mktemp("certificate")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hooks.example")])
        today = datetime.datetime.now(datetime.timezone.utc)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - datetime.timedelta(days=1))
            .not_valid_after(today + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / "key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return folder / "certificate.pem", folder / "key.pem"

    def test_a_certificate_is_checked_against_name_and_authority(self, certificate: tuple[Path, Path]) -> None:
        trusting = LOCAL.model_copy(update={"ca_file": str(certificate[0])})

        def here(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        with receiver(certificate) as there:
            assert post(there.url("/a", "hooks.example"), {}, b"{}", trusting, here) == 200
            for url, config in (("hooks.example", LOCAL), ("other.example", trusting)):
                with pytest.raises(OutboundError, match="TLS failed"):
                    post(there.url("/b", url), {}, b"{}", config, here)
            assert there.at("/b") == []

    def test_a_file_of_authorities_that_is_none(self, catalogue: Catalogue, tmp_path: Path) -> None:
        (tmp_path / "empty.pem").write_bytes(b"")
        for name in ("empty.pem", "missing.pem"):
            with pytest.raises(ConfigError, match=r"webhooks\.ca_file"):
                Deliverer(catalogue, LOCAL.model_copy(update={"ca_file": str(tmp_path / name)}))

    def test_plain_http_where_tls_is_asked_for(self, there: Receiver) -> None:
        with pytest.raises(OutboundError, match="TLS failed"):
            post(f"https://127.0.0.1:{there.port}/", {}, b"{}", LOCAL)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2001:0:808:808::f5ff:fffe",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert forbidden_address(address)
    host = f"[{address}]" if ":" in address else address
    assert url_problem(f"https://{host}/", WebhookConfig()) is not None
    assert url_problem(f"https://{host}/", WebhookConfig(allow_private=True)) is None


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert not forbidden_address(address)


class TestEndpoints:
    @pytest.fixture
    def anna(self, client_of: ClientOf) -> TestClient:
        return client_of("anna")

    def test_the_openai_client_manages_endpoints(self, anna: TestClient, catalogue: Catalogue) -> None:
        webhooks = openai_client(anna).webhooks
        made = webhooks.create(name="mine", url="https://hooks.example/a", event_types=[SUCCEEDED])
        assert made.signing_secret.startswith("whsec_") and made.signing_secret_hint == made.signing_secret[-4:]
        assert (made.name, made.url, made.event_types) == ("mine", "https://hooks.example/a", [SUCCEEDED])
        second = webhooks.create(name="two", url="https://hooks.example/b", event_types=[FAILED, SUCCEEDED, FAILED])
        assert second.event_types == [FAILED, SUCCEEDED]
        assert [item.id for item in webhooks.list(limit=1)] == [second.id, made.id]
        assert webhooks.retrieve(made.id).url == made.url
        fresh = webhooks.rotate_secret(made.id).signing_secret
        assert fresh != made.signing_secret
        assert catalogue.webhooks.get(catalogue.tenants.named("anna").id, made.id).secret == fresh
        assert webhooks.delete(made.id).deleted
        assert [item.id for item in webhooks.list()] == [second.id]

    def test_the_openai_client_changes_an_endpoint(self, anna: TestClient, catalogue: Catalogue, clock: Clock) -> None:
        webhooks, tenant = openai_client(anna).webhooks, catalogue.tenants.named("anna").id
        made = webhooks.create(name="mine", url="https://hooks.example/a", event_types=[SUCCEEDED])
        clock.now += 10
        same = webhooks.update(made.id, name="mine", url=made.url, event_types=[SUCCEEDED])
        assert same.updated_at == made.updated_at == made.created_at
        other = webhooks.update(made.id, event_types=[FAILED, SUCCEEDED])
        assert (other.event_types, other.name, other.url) == ([FAILED, SUCCEEDED], "mine", made.url)
        assert other.updated_at == made.created_at + 10
        assert webhooks.update(made.id, name="new").name == "new"
        assert webhooks.update(made.id, url="https://hooks.example/b").url == "https://hooks.example/b"
        assert webhooks.retrieve(made.id) == webhooks.update(made.id)
        assert catalogue.webhooks.get(tenant, made.id).secret == made.signing_secret
        lines = [line.detail for line in catalogue.audit.list(action="webhook.update").items]
        assert lines == [{"changed": ["url"], "host": "hooks.example"}, {"changed": ["name"]}, {"changed": ["events"]}]
        assert webhooks.event_types.list().data == [SUCCEEDED, FAILED, "fine_tuning.job.cancelled"]
        WebhookEventTypeList.model_validate(anna.get("/v1/webhook_event_types").json(), strict=True)

    def test_a_sample_is_sent_at_once_and_its_answer_told(
        self, anna: TestClient, catalogue: Catalogue, service: Service, there: Receiver
    ) -> None:
        local = service.settings.model_copy(update={"webhooks": LOCAL})
        anna.app.state.service = dataclasses.replace(service, settings=local)  # type: ignore[attr-defined]
        webhooks, tenant = openai_client(anna).webhooks, catalogue.tenants.named("anna").id
        made = webhooks.create(name="mine", url=there.url("/status/503"), event_types=[SUCCEEDED])
        found = webhooks.test(made.id, event_type=FAILED)
        assert (found.status_code, found.success, found.event_type) == (503, True, FAILED)
        raw = anna.post(f"{ENDPOINTS}/{made.id}/test", json={"event_type": FAILED}).json()
        WebhookEndpointTestResult.model_validate(raw, strict=True)
        for headers, body in there.at("/status/503"):
            event = VERIFIER.webhooks.unwrap(body, headers, secret=made.signing_secret)
            assert event.type == FAILED and event.id == headers["webhook-id"]  # type: ignore[union-attr]
        assert len(there.received) == 2 and catalogue.webhooks.deliveries(tenant) == []
        webhooks.update(made.id, url=there.url("/garbage"))
        with pytest.raises(BadRequestError, match="does not speak HTTP") as failed:
            webhooks.test(made.id, event_type=FAILED)
        assert failed.value.code == "webhook_test_failed"

    def test_one_sample_at_a_time_waits_for_a_machine_of_the_tenants(
        self, anna: TestClient, client_of: ClientOf, service: Service, there: Receiver
    ) -> None:
        local = service.settings.model_copy(update={"webhooks": LOCAL})
        anna.app.state.service = dataclasses.replace(service, settings=local)  # type: ignore[attr-defined]
        ben = client_of("ben")
        hangs, answers = (
            client.post(ENDPOINTS, json={"url": there.url(path), "event_types": [FAILED]}).json()["id"]
            for client, path in ((anna, "/hang"), (ben, "/a"))
        )
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(anna.post, f"{ENDPOINTS}/{hangs}/test", json={"event_type": FAILED})
            try:
                deadline = time.monotonic() + 120
                while not there.at("/hang"):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                again = anna.post(f"{ENDPOINTS}/{hangs}/test", json={"event_type": FAILED})
                assert again.status_code == 429 and again.headers["retry-after"] == "1"
                other = ben.post(f"{ENDPOINTS}/{answers}/test", json={"event_type": FAILED})
                assert other.json()["status_code"] == 200
            finally:
                there.over.set()
            assert first.result(120).status_code == 400, "it was cut off"
        assert len(there.at("/hang")) == 1

    def test_an_old_secret_signs_for_a_day_where_that_is_asked_for(
        self, anna: TestClient, catalogue: Catalogue, there: Receiver, deliverer: Deliverer, clock: Clock
    ) -> None:
        tenant = catalogue.tenants.named("anna").id
        made = endpoint(catalogue, tenant, there.url("/a"))
        webhooks, secrets = openai_client(anna).webhooks, [made.secret]
        for keep in (True, False, True):
            secrets.append(webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=keep).signing_secret)
            end_a_job(catalogue, tenant)
            assert deliver(deliverer, clock) == 1
        clock.now += 24 * 3600
        catalogue.webhooks.sweep(10**6)
        assert catalogue.webhooks.get(tenant, made.id).previous_secret is None
        end_a_job(catalogue, tenant)
        assert deliver(deliverer, clock) == 1

        def taken_by(headers: dict[str, str], body: bytes) -> list[int]:
            stamp = int(headers["webhook-timestamp"])
            signed = [signature(secret, headers["webhook-id"], stamp, body) for secret in secrets]
            assert set(headers["webhook-signature"].split()) <= set(signed)
            return [number for number, found in enumerate(signed) if found in headers["webhook-signature"].split()]

        assert [taken_by(headers, body) for headers, body in there.at("/a")] == [[0, 1], [2], [2, 3], [3]]
        headers, body = there.at("/a")[0]
        for secret in secrets[:2]:
            assert VERIFIER.webhooks.unwrap(body, headers, secret=secret).type == SUCCEEDED

    def test_the_objects_are_openais_and_secrets_are_shown_once(self, anna: TestClient) -> None:
        body = {"name": "mine", "url": "https://hooks.example/a", "event_types": [SUCCEEDED]}
        made = anna.post(ENDPOINTS, json=body)
        secret = WebhookEndpointWithSecret.model_validate(made.json(), strict=True).signing_secret
        path = f"{ENDPOINTS}/{made.json()['id']}"
        shown = anna.get(path)
        parsed = WebhookEndpoint.model_validate(shown.json(), strict=True)
        assert set(WebhookEndpoint.model_fields) <= set(shown.json()) and parsed.updated_at is not None
        assert all(secret not in answer.text for answer in (shown, anna.get(ENDPOINTS)))
        DeletedWebhookEndpoint.model_validate(anna.delete(path).json(), strict=True)
        assert anna.get(path).status_code == anna.delete(path).status_code == 404

    def test_a_repetition_has_no_second_effect_and_no_secret(self, anna: TestClient) -> None:
        body = {"url": "https://hooks.example/a", "event_types": [SUCCEEDED]}
        first, again = (anna.post(ENDPOINTS, json=body, headers={"idempotency-key": "k"}) for _ in range(2))
        assert again.json() == {**first.json(), "signing_secret": None}
        assert len(anna.get(ENDPOINTS).json()["data"]) == 1
        path = f"{ENDPOINTS}/{first.json()['id']}/rotate_secret"
        first, again = (anna.post(path, headers={"idempotency-key": "k2"}) for _ in range(2))
        assert first.json()["signing_secret"] and again.json()["signing_secret"] is None

    def test_a_rotation_that_is_tried_again_gives_the_same_secret(
        self, anna: TestClient, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = anna.post(ENDPOINTS, json={"url": "https://hooks.example/a", "event_types": [SUCCEEDED]}).json()
        path, headers = f"{ENDPOINTS}/{made['id']}/rotate_secret", {"idempotency-key": "k"}
        tenant, forget = catalogue.tenants.named("anna").id, catalogue.idempotency.leave

        def die(tenant_id: str, key: str, holder: str, *_: object) -> None:
            forget(tenant_id, key, holder)
            raise DatabaseUnavailableError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(catalogue.idempotency, "finish", die)
            assert anna.post(path, headers=headers).status_code == 503
        first = catalogue.webhooks.get(tenant, made["id"]).secret
        assert first != made["signing_secret"]
        assert anna.post(path, headers=headers).json()["signing_secret"] == first
        assert anna.post(path, headers={"idempotency-key": "k2"}).json()["signing_secret"] != first

    def test_changes_are_audited_and_secrets_are_in_no_log(
        self, anna: TestClient, catalogue: Catalogue, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        body = {"url": "https://hooks.example/T0K3N", "event_types": [SUCCEEDED]}
        made = anna.post(ENDPOINTS, json=body).json()
        path = f"{ENDPOINTS}/{made['id']}"
        secrets = [made["signing_secret"], anna.post(f"{path}/rotate_secret").json()["signing_secret"], "T0K3N"]
        anna.delete(path)
        lines = catalogue.audit.list().items
        assert [line.action for line in lines] == ["webhook.delete", "webhook.rotate_secret", "webhook.create"]
        assert {line.target for line in lines} == {made["id"]}
        assert not any(secret in text for secret in secrets for text in (caplog.text, str(lines)))
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as database:
            assert database.execute("SELECT id, secret FROM webhooks").fetchall() == [(made["id"], "")]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"url": "http://hooks.example/"}, "url"),
            ({"url": "ftp://hooks.example/"}, "url"),
            ({"url": "hooks.example"}, "url"),
            ({"url": ""}, "url"),
            ({"url": "https://"}, "url"),
            ({"url": "https://:443/"}, "url"),
            ({"url": "https://localhost/"}, "url"),
            ({"url": "https://a.localhost./"}, "url"),
            ({"url": "https://127.0.0.1/"}, "url"),
            ({"url": "https://[::1]/"}, "url"),
            ({"url": "https://[::1/"}, "url"),
            ({"url": "https://169.254.169.254/latest/meta-data"}, "url"),
            ({"url": "https://user:word@hooks.example/"}, "url"),
            ({"url": "https://hooks.example/#x"}, "url"),
            ({"url": "https://hooks.example:0/"}, "url"),
            ({"url": "https://hooks.example:99999/"}, "url"),
            ({"url": "https://hooks.example:x/"}, "url"),
            ({"url": "https://hooks.example/a b"}, "url"),
            ({"url": "https://hooks.example/\r\nx: y"}, "url"),
            ({"url": "https://hooks.example\\@inner/"}, "url"),
            ({"url": "https://h\u00f6oks.example/"}, "url"),
            ({"url": "https://hooks.example/" + "a" * 2048}, "url"),
            ({"url": 3}, "url"),
            ({"url": None}, "url"),
            ({"event_types": []}, "event_types"),
            ({"event_types": ["batch.completed"]}, "event_types"),
            ({"event_types": [SUCCEEDED] * 17}, "event_types"),
            ({"event_types": SUCCEEDED}, "event_types"),
            ({"name": " "}, "name"),
            ({"name": "a\u202eb"}, "name"),
            ({"name": "a" * 257}, "name"),
            ({"secret": "whsec_x"}, "secret"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, anna: TestClient, change: dict[str, Any], param: str) -> None:
        body = {"url": "https://hooks.example/", "event_types": [SUCCEEDED], **change}
        answer = anna.post(ENDPOINTS, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        assert anna.get(ENDPOINTS).json()["data"] == []
        made = anna.post(ENDPOINTS, json=GOOD).json()
        if None not in change.values():  # which leaves a field as it is
            answer = anna.post(f"{ENDPOINTS}/{made['id']}", json=change)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        assert anna.get(f"{ENDPOINTS}/{made['id']}").json()["updated_at"] == made["updated_at"]

    def test_there_may_be_so_many(self, anna: TestClient, service: Service) -> None:
        most = service.settings.webhooks.endpoints_per_tenant
        body = {"url": "https://hooks.example/", "event_types": [SUCCEEDED]}
        assert [anna.post(ENDPOINTS, json=body).status_code for _ in range(most + 1)] == [200] * most + [400]
        one = anna.get(ENDPOINTS).json()["data"][0]["id"]
        anna.delete(f"{ENDPOINTS}/{one}")
        assert anna.post(ENDPOINTS, json=body).status_code == 200

    def test_anothers_endpoint_is_as_unknown_as_none(self, anna: TestClient, client_of: ClientOf) -> None:
        body = {"url": "https://hooks.example/", "event_types": [SUCCEEDED]}
        mine, ben = anna.post(ENDPOINTS, json=body).json()["id"], client_of("ben")
        nobodys = "wh_" + "0" * 24
        calls = [("GET", "", None), ("DELETE", "", None), ("POST", "/rotate_secret", None), ("POST", "", {"name": "x"})]
        for method, path, sent in (*calls, ("POST", "/test", {"event_type": SUCCEEDED})):
            theirs, none = (ben.request(method, f"{ENDPOINTS}/{one}{path}", json=sent) for one in (mine, nobodys))
            assert theirs.status_code == none.status_code == 404
            assert theirs.text.replace(mine, nobodys) == none.text
        assert ben.get(ENDPOINTS).json()["data"] == []
        assert ben.get(ENDPOINTS, params={"after": mine}).status_code == 404
        assert anna.get(f"{ENDPOINTS}/{mine}").status_code == 200

    def test_a_key_without_the_scope(self, client_of: ClientOf) -> None:
        assert client_of("anna", scopes=["files"]).get(ENDPOINTS).status_code == 403
        assert client_of(None).get(ENDPOINTS).status_code == 401
