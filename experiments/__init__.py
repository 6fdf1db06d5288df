"""Experiments: who sees what (layers, assignment), by which configuration, who was exposed, and what it did.

`experiments.snapshot` assigns, `experiments.store` keeps and follows the configuration, `experiments.exposure` says
what to log, `experiments.stats` judges. Knows `plait` and nobody else.
"""
