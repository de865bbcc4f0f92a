"""`python -m serve.admin`: what an operator types, and what it leaves in the database."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from serve.admin import main
from serve.catalogue import Catalogue, TenantLimits
from tests.fixtures.postgres import PostgresServer

Admin = Callable[..., str]


@pytest.fixture
def admin(any_database_url: str, capsys: pytest.CaptureFixture[str]) -> Admin:
    """Runs a command that must work, and returns what it printed."""

    def run(*arguments: str) -> str:
        assert main(["--database", any_database_url, *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def secret_in(text: str) -> str:
    (found,) = re.findall(r"sk-ot-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", text)
    return found


def test_a_tenant_and_its_keys_from_beginning_to_end(admin: Admin, any_catalogue: Catalogue) -> None:
    admin("tenant", "create", "anna", "running_jobs=2")
    tenant = any_catalogue.tenants.named("anna")
    assert tenant.limits == TenantLimits(running_jobs=2)
    printed = admin("key", "create", "anna", "--scopes", "files, jobs", "--expires-days", "90", "--name", "laptop")
    secret = secret_in(printed)
    found = any_catalogue.keys.authenticate(secret)
    assert found is not None and found.tenant == tenant and found.refusal is None
    assert found.key.scopes == {"files", "jobs"} and found.key.expires_at == found.key.created_at + 90 * 86400
    listed = admin("key", "list")
    assert found.key.id in listed and "laptop" in listed and f"...{secret[-4:]}" in listed and secret not in listed

    rotated = any_catalogue.keys.authenticate(secret_in(admin("key", "rotate", found.key.id, "--overlap-hours", "1")))
    assert rotated is not None and rotated.key.scopes == found.key.scopes and rotated.key.id != found.key.id
    assert any_catalogue.keys.authenticate(secret).refusal is None  # type: ignore[union-attr]
    admin("key", "revoke", found.key.id)
    assert any_catalogue.keys.authenticate(secret).refusal == "revoked"  # type: ignore[union-attr]
    states = {line.split()[0]: line.split()[-1] for line in admin("key", "list", "anna").splitlines()[1:]}
    assert states == {found.key.id: "revoked", rotated.key.id: "active"}

    assert "running_jobs=5, queued_jobs=0" in admin("tenant", "limits", "anna", "running_jobs=5", "queued_jobs=0")
    assert any_catalogue.tenants.get(tenant.id).limits == TenantLimits(running_jobs=5, queued_jobs=0)
    admin("tenant", "disable", "anna")
    assert "disabled" in admin("tenant", "list")
    admin("tenant", "enable", "anna")
    assert re.search(r"anna +\S+ \S+ +active +5 +0 ", admin("tenant", "list"))

    log = admin("audit")
    actions = [json.loads(line)["action"] for line in log.splitlines()]
    assert actions == [
        "tenant.create",
        "key.create",
        "key.rotate",
        "key.revoke",
        "tenant.change",
        "tenant.change",
        "tenant.change",
    ]
    assert "sk-ot-" not in log
    assert len(admin("audit", "--action", "tenant.change").splitlines()) == 3
    assert admin("audit", "--tenant", "anna") == "", "the operator's commands are no tenant's"


def test_webhooks(admin: Admin, any_catalogue: Catalogue) -> None:
    admin("tenant", "create", "anna")
    printed = admin("webhook", "create", "anna", "https://a.example/hook", "--events", "fine_tuning.job.failed")
    tenant_id = any_catalogue.tenants.named("anna").id
    (webhook,) = any_catalogue.webhooks.list(tenant_id).items
    assert webhook.secret in printed and webhook.events == ["fine_tuning.job.failed"]
    listed = admin("webhook", "list", "anna")
    assert webhook.id in listed and webhook.secret not in listed
    admin("webhook", "create", "anna", "https://b.example/hook")
    assert len(any_catalogue.webhooks.list(tenant_id).items[0].events) == 3, "every event, if none is named"
    admin("webhook", "delete", "anna", webhook.id)
    assert webhook.id not in admin("webhook", "list", "anna")
    assert "whsec_" not in admin("audit")


def test_the_first_command_makes_the_tables(bare_database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--database", bare_database_url, "tenant", "create", "anna"]) == 0
    assert main(["--database", bare_database_url, "migrate"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tenant", "create", "a:b"], "no name"),
        (["tenant", "create", "anna"], "already there"),
        (["tenant", "create", "bea", "running_jobs=two"], "running_jobs=2"),
        (["tenant", "limits", "anna", "running_job=2"], "did you mean running_jobs?"),
        (["tenant", "limits", "anna", "tokens_per_day=99999999999999999999"], "tokens_per_day"),
        (["tenant", "limits", "nobody", "running_jobs=2"], "no tenant 'nobody'"),
        (["tenant", "disable", "nobody"], "no tenant 'nobody'"),
        (["key", "create", "anna", "--scopes", "files,root"], "scopes are root; use some of files"),
        (["key", "create", "anna", "--scopes", ","], "scopes are none"),
        (["key", "create", "anna", "--scopes", "files", "--name", "x" * 65], "65 characters"),
        (["key", "create", "nobody", "--scopes", "files"], "no tenant 'nobody'"),
        (["key", "revoke", "key_x"], "no key 'key_x'"),
        (["key", "rotate", "key_x"], "no key 'key_x'"),
        (["webhook", "create", "anna", "ftp://a.example"], "ftp://a.example"),
        (["webhook", "create", "anna", "https://a.example", "--events", "x"], "event_types"),
        (["webhook", "delete", "anna", "wh_x"], "no webhook endpoint 'wh_x'"),
        (["audit", "--tenant", "nobody"], "no tenant 'nobody'"),
    ],
)
def test_mistakes_are_told_and_change_nothing(
    sqlite_url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["--database", sqlite_url, "tenant", "create", "anna"]) == 0
    capsys.readouterr()
    assert main(["--database", sqlite_url, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and reason in printed.err
    assert main(["--database", sqlite_url, "audit"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["key"], ["key", "create", "anna"], ["tenant", "drop"], ["key", "rotate"]])
def test_commands_that_are_none_show_how_they_are_written(
    sqlite_url: str, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--database", sqlite_url, *arguments])
    assert ended.value.code == 2 and "usage: python -m serve.admin" in capsys.readouterr().err


def test_a_password_in_the_address_is_refused_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--database", "postgresql://u:hunter2@127.0.0.1/db", "tenant", "list"]) == 2
    error = capsys.readouterr().err
    assert "PGPASSWORD" in error and "hunter2" not in error


def test_a_database_that_does_not_answer_is_told(postgres: PostgresServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--database", postgres.url("no_such_database"), "tenant", "list"]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_the_module_runs_as_a_command_without_models(sqlite_url: str) -> None:
    script = (
        "import runpy, sys; sys.argv = ['admin', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('serve.admin', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'ray', 'fastapi'} & set(sys.modules), 'a command must start at once'"
    )
    command = [sys.executable, "-c", script, "--database", sqlite_url]
    done = subprocess.run([*command, "tenant", "create", "anna"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "") and re.fullmatch(r"ten_[0-9a-f]{24}  anna\n", done.stdout)
