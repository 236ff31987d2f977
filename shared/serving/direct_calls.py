"""ModelInfer without a task: what a front that can do so answers from the event loop's callbacks alone.

A call whose header was seen before (wire.py), of a variant in memory, with a place in its queue, needs nothing that
could wait but its batch. So it goes into the queue as it arrives and is answered when its batch is. Everything else,
such as what a canary routed, what is traced, and what fails its checks, takes the usual way through the handler.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shared.serving.batching import BatchResult, QueuedItem
from shared.serving.calls import REQUEST_ID, CallScope
from shared.serving.engine import Engine
from shared.serving.handlers import CallRecord
from shared.serving.inference_requests import graph_failure
from shared.serving.telemetry import MethodObserver
from shared.serving.versions import ServedVariant
from shared.serving.wire import InferPlans, Match

if TYPE_CHECKING:
    from shared.serving.native_front import NativeContext


class DirectInfer:
    """Takes the calls of ModelInfer that need no task.

    Args:
        engine: runs the models.
        plans: the headers that were seen.
        observer: of the method.
    """

    def __init__(self, engine: Engine, plans: InferPlans, observer: MethodObserver) -> None:
        self.repository, self.observer = engine.repository, observer
        self._plans = plans
        self._tracing = engine.telemetry.tracing is not None

    def __call__(self, message: bytes, context: NativeContext) -> DirectCall | None:
        """Puts a call into the queue of its model; None for a call that must take the usual way."""
        if self._tracing:
            return None
        seen = self._plans.match(message)
        if seen is None or context.is_routed():
            return None
        plan = seen.plan
        served = self.repository.ready(plan.model_name, plan.model_version, plan.variant)
        if served is None or served.batcher.full or served.manifest is not plan.manifest:
            return None
        scope = self.observer.begin(context.invocation_metadata())
        context.set_trailing_metadata(((REQUEST_ID, scope.request_id),))
        self.observer.received(len(message))
        self.repository.lease(served)
        call = DirectCall(self, scope, context, seen, served)
        served.batcher.enter(call)  # may answer it right here
        return call


class DirectCall(QueuedItem):
    """A call in a queue; it answers its caller itself."""

    __slots__ = ("_batcher", "_context", "_direct", "_id", "_over", "_plan", "_scope", "_served")

    def __init__(
        self,
        direct: DirectInfer,
        scope: CallScope,
        context: NativeContext,
        seen: Match,
        served: ServedVariant,
    ) -> None:
        super().__init__(seen.feeds, context.deadline, scope)
        self._direct, self._scope, self._context = direct, scope, context
        self._plan, self._served, self._id = seen.plan, served, seen.id
        self._batcher = served.batcher  # the variant may get another one meanwhile
        self._over = False

    def abandoned(self) -> bool:
        """See QueuedItem."""
        return self._over

    def answer(self, result: BatchResult) -> None:
        """Sends the result."""
        try:
            message = self._plan.answer(self._id, self._served.version, self._served.variant, result)
        except Exception as error:  # one call's answer must not cost its neighbours theirs
            self.fail(error)
            return
        self._over = True
        observer = self._direct.observer
        observer.sent(len(message))
        self._context.respond(message)
        self._served.observer.request_done(self.call, time.perf_counter() - self.enqueued)
        self._scope.finish("OK")
        self._leave()

    def fail(self, error: Exception) -> None:
        """Sends the status of an error."""
        self._over = True
        self._served.observer.request_failed(time.perf_counter() - self.enqueued)
        record = CallRecord(self._direct.observer, self._context, self._scope)
        self._context.fail(*record.failure(graph_failure(error) or error))
        self._leave()

    def cancel(self) -> None:
        """The caller left, or the server ends: nobody waits any more."""
        if not self._over:
            self._over = True
            self._batcher.withdraw(self)
            self._served.observer.request_failed(time.perf_counter() - self.enqueued)
            self._scope.finish("CANCELLED")
            self._leave()

    def _leave(self) -> None:
        self._batcher.leave()
        self._direct.repository.release(self._served)
        self._context.release()
