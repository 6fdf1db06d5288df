"""`plait audit`: offline equals online, or which feature does not, and why."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click

from plait.settings import find_home


@click.command()
@click.option("--since", type=click.DateTime(), help="Only impressions from this time on (UTC).")
@click.option("--rows", default=10_000, show_default=True, help="Newest impressions to audit, per model version.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--strict", is_flag=True, help='Exit with 1 if any feature differs for the reason "value".')
def audit(since: datetime | None, rows: int, form: str, strict: bool) -> None:
    """Rebuild the features of logged predictions offline, as of each request, and compare them with what was served.

    Differences come with their reason; "not materialized" means that the online store was older than the request.
    """
    from plait.audit import audit as run_audit

    found = run_audit(find_home(), since=since.replace(tzinfo=UTC) if since else None, max_rows=rows)
    if form == "json":
        click.echo(json.dumps([each.to_json() for each in found], indent=2))
    else:
        for each in found:
            _tell(each)
    if strict and any(feature.reasons.get("value") for each in found for feature in each.features):
        raise click.exceptions.Exit(1)


def _tell(result: object) -> None:
    from plait.audit import ModelAudit

    assert isinstance(result, ModelAudit)
    compared = sum(feature.n_rows for feature in result.features)
    click.echo(
        f"{result.model} over {result.service}: {result.n_rows:,} impressions, {compared:,} feature values, "
        f"{result.n_different:,} differ; scores move by {result.score_moved_max:.2g} at most"
    )
    for note in result.notes:
        click.echo(f"  {note}")
    for feature in result.features:
        if feature.n_different:
            why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(feature.reasons.items()))
            click.echo(f"  {feature.name:<28} {feature.n_different:>7,} of {feature.n_rows:,}: {why}")
    if result.logged_score_off_max > 1e-5:
        click.echo(f"  the logged scores differ from the logged features' by up to {result.logged_score_off_max:.2g}")
