"""Hostile input against a real server in a process of its own: `make fuzz`, and `python -m tests.fuzz` for more of it.

The files that pytest runs here do not begin with `test_`, so that `make test` leaves them to `make fuzz`.
"""
