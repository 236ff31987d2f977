"""Pipelines: models chained by a file, with early exit for each item; docs/pipelines.md explains them.

definition.py    pipeline.toml → dataclasses        checking.py   do names, types and shapes fit?  → a plan
expressions.py   `max(softmax(a.logits)) < 0.9`     running.py    a plan and tensors → tensors
steps.py         one step: a model here, or one     registry.py   the pipelines of a process and their state
upstreams.py     at another server, over gRPC       metrics.py    what they count
"""
