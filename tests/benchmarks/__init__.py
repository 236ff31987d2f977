"""Measurements; never part of the test suite, since machines are noisy. `make bench` runs them."""
