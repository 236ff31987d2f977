"""Calls in the background while a test stops, replaces or adds containers."""

import threading
import time

from tests.e2e.stack import Caller

WORKERS = 16
REFUSED_PAUSE_SECONDS = 0.05  # a refusal takes no time; without a pause they would be all that runs


class Load:
    """Calls in the background, each with its start in seconds and how it went.

    Args:
        target: the gateway.
        rate: calls a second, started on time whether or not earlier ones are answered; None calls as fast as
            `WORKERS` callers can.
        **caller: see Caller.
    """

    def __init__(self, target, rate=None, **caller):
        self.outcomes = []  # (started, ended, Refused or None)
        self._target, self._rate, self._caller = target, rate, caller
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(WORKERS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number):
        pause = WORKERS / self._rate if self._rate else 0.0
        due = time.monotonic() + number / WORKERS * pause
        with Caller(self._target, **self._caller) as caller:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                started = time.monotonic()
                outcome = caller.call(number)
                ended = time.monotonic()
                if outcome is not None:
                    self._stop.wait(REFUSED_PAUSE_SECONDS)
                self.outcomes.append((started, ended, outcome))
                number += 1
                due = max(due + pause, time.monotonic() - 1.0)

    def failures(self):
        return [outcome for _, _, outcome in self.outcomes if outcome is not None]
