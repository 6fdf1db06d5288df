"""Tables of the experiment store, in the home's plait.db or in any database that SQLAlchemy reaches."""

from __future__ import annotations

import sqlalchemy as sa

from plait.database import Schema

metadata = sa.MetaData()

config_versions = sa.Table(
    "experiment_config_versions",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    sa.Column("author", sa.String(200), nullable=False),
    sa.Column("origin", sa.String(20), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("diff", sa.Text, nullable=False),
)

policy_versions = sa.Table(
    "experiment_policies",
    metadata,
    sa.Column("experiment", sa.String(100), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    sa.Column("author", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)

sticky_arms = sa.Table(
    "experiment_sticky_arms",
    metadata,
    sa.Column("experiment", sa.String(100), primary_key=True),
    sa.Column("unit_kind", sa.String(40), primary_key=True),
    sa.Column("unit", sa.LargeBinary(2100), primary_key=True),
    sa.Column("arm", sa.String(100), nullable=False),
    sa.Column("created", sa.DateTime(timezone=True), nullable=False),
)

# A table added here needs no new version; a change of one that is there does, with the statements that make it.
SCHEMA = Schema(part="experiments", version=1, metadata=metadata)
