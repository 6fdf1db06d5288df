"""`plait keys`: who may ask the server for what."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import click

from plait.errors import SpecError
from plait.keys import SCOPES, ApiKey, KeyStore
from plait.settings import author_name, find_home

_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}


@click.group()
def keys() -> None:
    """API keys: a client sends one as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

    Scopes: predict (rankings, inference), events (feedback), admin (change experiments and models, and see them).
    Changes through the server always need an admin key; the rest needs one under `plait serve --require-keys`.
    """


@keys.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help=f"One of {', '.join(SCOPES)}; repeatable.")
@click.option("--expires", help="After 90d, 12h or 30m, or at 2027-01-31 (UTC). Default: never.")
@click.option("--author", help="Who makes the key (default: PLAIT_AUTHOR, else the login name).")
def create(name: str, scopes: tuple[str, ...], expires: str | None, author: str | None) -> None:
    """Make a key called NAME and print it: this once, it is kept nowhere. NAME signs the changes made with it."""
    key, token = KeyStore(find_home()).create(name, scopes, author=author_name(author), expires=_moment(expires))
    until = f", until {key.expires:%Y-%m-%d %H:%M}Z" if key.expires else ""
    click.echo(f"key {key.id} of {name} for {', '.join(key.scopes)}{until}; it is shown this once:", err=True)
    click.echo(token)


@keys.command("list")
@click.option("--all", "everything", is_flag=True, help="Revoked and expired ones too.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_keys(everything: bool, as_json: bool) -> None:
    """Keys by name: id, scopes, who made it and when, and when it ends."""
    now = datetime.now(UTC)
    found = [key for key in KeyStore(find_home()).all() if everything or key.usable(now)]
    if as_json:
        click.echo(json.dumps([_record(key) for key in found], indent=2))
        return
    if not found:
        click.echo("there is no usable key; `plait keys create NAME --scope admin` makes one", err=True)
    for key in found:
        state = "never expires" if key.expires is None else f"expires {key.expires:%Y-%m-%d %H:%M}Z"
        if key.revoked:
            state = f"revoked {key.revoked:%Y-%m-%d %H:%M}Z"
        elif not key.usable(now):
            state = f"expired {key.expires:%Y-%m-%d %H:%M}Z"
        click.echo(
            f"{key.id}  {key.name:<24} {','.join(key.scopes):<20} {key.created:%Y-%m-%d}  by {key.author}  {state}"
        )


@keys.command()
@click.argument("name")
def revoke(name: str) -> None:
    """End the key NAME (or id) for good; running servers refuse it within two seconds."""
    key = KeyStore(find_home()).revoke(name)
    click.echo(f"key {key.id} of {key.name} is revoked; running servers refuse it within two seconds")


def _record(key: ApiKey) -> dict[str, object]:
    times = {name: value.isoformat() if value else None for name, value in (
        ("created", key.created), ("expires", key.expires), ("revoked", key.revoked)
    )}  # fmt: skip
    return {"id": key.id, "name": key.name, "scopes": list(key.scopes), "author": key.author, **times}


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    if found := re.fullmatch(r"([0-9]{1,5})([mhd])", text):
        return datetime.now(UTC) + int(found[1]) * _UNITS[found[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SpecError(
            f"--expires {text!r} is neither a time span such as 90d nor a date such as 2027-01-31"
        ) from error
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
