"""Feast plug-ins: the offline store (DuckDB), the online stores (SQLite, Redis) and the compute engine."""
