"""`python -m serve.admin --database URL ...`: tenants, keys, webhooks and the audit log at the operator's shell.

The same over HTTP is routes/keys.py and routes/audit.py. A secret is printed once, by the command that makes it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import cast
from urllib.parse import urlsplit

from pydantic import ValidationError

from ot_ray.config import parse
from ot_ray.errors import ConfigError, OTRayError
from serve.catalogue import SCOPES, Catalogue, DatabaseConfig, TenantLimits, new_id
from serve.catalogue.audit import Note
from serve.catalogue.keys import NewKey
from serve.catalogue.records import Tenant
from serve.wire.webhooks import EVENT_TYPES, EventType, WebhookConfig, WebhookRequest, url_problem

_DAY_S = 24 * 3600
_ALL = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 if not, with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        catalogue = Catalogue.open(parse(DatabaseConfig, {"url": options.database}, "--database"))
        try:
            if options.run is not _migrate:
                catalogue.prepare()
            options.run(catalogue, options)
        finally:
            catalogue.close()
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has seen enough
    except OTRayError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.admin", description="Administer a service's database.")
    parser.add_argument(
        "--database", required=True, metavar="URL", help="sqlite:///path or postgresql://user@host/name"
    )
    nouns = parser.add_subparsers(required=True, metavar="command")
    _tenant_commands(nouns.add_parser("tenant", help="customers' accounts").add_subparsers(required=True))
    _key_commands(nouns.add_parser("key", help="API keys").add_subparsers(required=True))
    _webhook_commands(nouns.add_parser("webhook", help="who is told of events").add_subparsers(required=True))
    audit = _command(nouns, "audit", _audit, "print the audit log as JSON lines, the oldest first")
    audit.add_argument("--tenant", help="only what this tenant's keys did")
    audit.add_argument("--action", help="only this action, as in key.revoke")
    _command(nouns, "migrate", _migrate, "bring the tables to what this version works with")
    return parser


def _tenant_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = _command(verbs, "create", _create_tenant, "add a tenant")
    create.add_argument("name")
    create.add_argument("limits", nargs="*", metavar="limit=value")
    _command(verbs, "list", _list_tenants, "every tenant with its limits")
    limits = _command(verbs, "limits", _change_limits, "change limits; they hold from the next request on")
    limits.add_argument("name")
    limits.add_argument("limits", nargs="+", metavar="limit=value", help=f"of {', '.join(TenantLimits.model_fields)}")
    for verb, explained in (("disable", "refuse every key of a tenant"), ("enable", "take its keys again")):
        _command(verbs, verb, _switch_tenant, explained).add_argument("name")
        verbs.choices[verb].set_defaults(verb=verb)


def _key_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = _command(verbs, "create", _create_key, "add a key and print its secret")
    create.add_argument("tenant")
    create.add_argument("--scopes", required=True, help=f"with commas between, of {', '.join(SCOPES)}")
    create.add_argument("--expires-days", type=_days, default=90, help="90 without it; 0 for no end")
    create.add_argument("--name", default="", help="what it is for")
    listed = _command(verbs, "list", _list_keys, "every key, without secrets")
    listed.add_argument("tenant", nargs="?")
    rotate = _command(verbs, "rotate", _rotate_key, "a new secret for the same scopes; the old one ends")
    rotate.add_argument("key")
    rotate.add_argument("--overlap-hours", type=_hours, default=24, help="hours that the old one is still taken; 24")
    _command(verbs, "revoke", _revoke_key, "refuse a key at once and for good").add_argument("key")


def _webhook_commands(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = _command(verbs, "create", _create_webhook, "tell an address of a tenant's events; prints the secret")
    create.add_argument("tenant")
    create.add_argument("url")
    create.add_argument("--events", help="with commas between; every event without it")
    create.add_argument("--name", default="webhook", help="what it is for")
    _command(verbs, "list", _list_webhooks, "a tenant's endpoints").add_argument("tenant")
    delete = _command(verbs, "delete", _delete_webhook, "tell an endpoint nothing more")
    delete.add_argument("tenant")
    delete.add_argument("webhook")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[Catalogue, argparse.Namespace], None],
    explained: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=explained, description=explained)
    parser.set_defaults(run=run)
    return parser


def _migrate(catalogue: Catalogue, options: argparse.Namespace) -> None:
    catalogue.migrate()
    _say("the tables are up to date")


def _create_tenant(catalogue: Catalogue, options: argparse.Namespace) -> None:
    limits = parse(TenantLimits, _values(options.limits), "limits")
    tenant = catalogue.tenants.create(options.name, limits, audit=Note("tenant.create", {"name": options.name}))
    _say(f"{tenant.id}  {tenant.name}")


def _list_tenants(catalogue: Catalogue, options: argparse.Namespace) -> None:
    rows = [("ID", "NAME", "CREATED", "STATE", *(name.upper() for name in TenantLimits.model_fields))]
    for tenant in catalogue.tenants.list():
        state = "active" if tenant.disabled_at is None else f"disabled {_date(tenant.disabled_at)}"
        limits = [str(value) for value in tenant.limits.model_dump().values()]
        rows.append((tenant.id, tenant.name, _date(tenant.created_at), state, *limits))
    _table(rows)


def _change_limits(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant = catalogue.tenants.named(options.name)
    changes = _values(options.limits)
    tenant = catalogue.tenants.change_limits(tenant.id, changes, Note("tenant.change", {"limits": changes}))
    _say(f"{tenant.name}: " + ", ".join(f"{name}={value}" for name, value in tenant.limits.model_dump().items()))


def _switch_tenant(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant = catalogue.tenants.named(options.name)
    switch = catalogue.tenants.disable if options.verb == "disable" else catalogue.tenants.enable
    switch(tenant.id, Note("tenant.change", {"disabled": options.verb == "disable"}))
    _say(f"{tenant.name} is {options.verb}d")


def _create_key(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant = catalogue.tenants.named(options.tenant)
    expires_at = catalogue.now() + options.expires_days * _DAY_S if options.expires_days else None
    scopes = _listed(options.scopes)
    line = Note("key.create", {"tenant": tenant.id, "scopes": sorted(set(scopes))})
    made = catalogue.keys.create(tenant.id, scopes, name=options.name, expires_at=expires_at, audit=line)
    _show(made, tenant)


def _list_keys(catalogue: Catalogue, options: argparse.Namespace) -> None:
    names = {tenant.id: tenant.name for tenant in catalogue.tenants.list()}
    asked = catalogue.tenants.named(options.tenant).id if options.tenant else None
    rows = [("ID", "TENANT", "NAME", "SECRET", "SCOPES", "EXPIRES", "STATE")]
    for key in catalogue.keys.list(asked, limit=_ALL).items:
        expired = key.expires_at is not None and key.expires_at <= catalogue.now()
        state = "revoked" if key.revoked_at is not None else "expired" if expired else "active"
        ends = "never" if key.expires_at is None else _date(key.expires_at)
        scopes = ",".join(sorted(key.scopes))
        rows.append((key.id, names[key.tenant_id], key.name or "-", f"...{key.hint}", scopes, ends, state))
    _table(rows)


def _rotate_key(catalogue: Catalogue, options: argparse.Namespace) -> None:
    new, overlap_s = new_id("key_"), options.overlap_hours * 3600
    line = Note("key.rotate", {"new": new, "overlap_s": overlap_s})
    made = catalogue.keys.rotate(options.key, overlap_s=overlap_s, successor_id=new, audit=line)
    _show(made, catalogue.tenants.get(made.key.tenant_id))
    _say(f"{options.key} is still taken for {options.overlap_hours} h at most")


def _revoke_key(catalogue: Catalogue, options: argparse.Namespace) -> None:
    key = catalogue.keys.revoke(options.key, Note("key.revoke"))
    _say(f"{key.id} is revoked")


def _create_webhook(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant = catalogue.tenants.named(options.tenant)
    events = _listed(options.events) if options.events else [*EVENT_TYPES]
    try:
        asked = WebhookRequest(url=options.url, event_types=cast("list[EventType]", events), name=options.name)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]} is {problem['input']!r}: {problem['msg']}") from None
    # What the deliveries may reach is the service's setting; here the operator types the address.
    problem = url_problem(asked.url, parse(WebhookConfig, {"allow_http": True, "allow_private": True}, "webhooks"))
    if problem is not None:
        raise ConfigError(f"url is {asked.url!r}: {problem}")
    host = urlsplit(asked.url).hostname
    line = Note("webhook.create", {"tenant": tenant.id, "host": host, "events": asked.event_types})
    webhook = catalogue.webhooks.create(tenant.id, asked.url, asked.event_types, name=asked.name, audit=line)
    assert webhook is not None  # only a limit on endpoints is answered by None
    _say(f"{webhook.id}  {webhook.url}\nsecret, shown this once: {webhook.secret}")


def _list_webhooks(catalogue: Catalogue, options: argparse.Namespace) -> None:
    webhooks = catalogue.webhooks.list(catalogue.tenants.named(options.tenant).id, limit=_ALL).items
    rows = [(item.id, item.url, ",".join(item.events), _date(item.created_at)) for item in webhooks]
    _table([("ID", "URL", "EVENTS", "CREATED"), *rows])


def _delete_webhook(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant = catalogue.tenants.named(options.tenant)
    webhook = catalogue.webhooks.disable(tenant.id, options.webhook, Note("webhook.delete", {"tenant": tenant.id}))
    _say(f"{webhook.id} is told nothing more")


def _audit(catalogue: Catalogue, options: argparse.Namespace) -> None:
    tenant_id = catalogue.tenants.named(options.tenant).id if options.tenant else None
    for line in catalogue.audit.json_lines(tenant_id=tenant_id, action=options.action):
        sys.stdout.write(line)


def _show(made: NewKey, tenant: Tenant) -> None:
    ends = "never" if made.key.expires_at is None else _date(made.key.expires_at)
    _say(f"{made.key.id}  {tenant.name}  {','.join(sorted(made.key.scopes))}  expires {ends}")
    _say(f"secret, shown this once: {made.secret}")


def _values(assignments: Iterable[str]) -> dict[str, int]:
    values = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign or not value.strip().isdecimal():
            raise ConfigError(f"{assignment!r} is no limit; write limit=number, as in running_jobs=2")
        values[name.strip()] = int(value)
    return values


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number between 0 and {most}")
    return int(text)


def _days(text: str) -> int:
    return _whole(text, 36500)


def _hours(text: str) -> int:
    return _whole(text, 24 * 90)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
