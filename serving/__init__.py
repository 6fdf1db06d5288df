"""The online strand: a Flask server that assigns, reads features, scores, answers and logs; and its simulated users.

Imports plait and experiments, never trainers and never torch. `create_app` takes its parts; `serving.build` makes the
real ones from a project's home, in the worker process that will use them.
"""
