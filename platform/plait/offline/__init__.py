"""Events to training sets: samples (attribution, filters, splits, negatives, weights), datasets and their readers.

Every step is one ibis expression, run by DuckDB or by Spark (`engine.open_engine`), with equal rows from both.
"""
