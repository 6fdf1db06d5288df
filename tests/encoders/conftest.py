"""Hypothesis without a deadline: the first example of a run also pays for imports."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
