"""Plait: one platform around a Feast feature store, from events to a served, tested model."""

__version__ = "0.1.0"
