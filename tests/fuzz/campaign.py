"""The attack: calls in rounds, and after each round the server must still do the right thing.

What counts as a finding: a code that is not in CODES, here or inside a stream; a refusal by the service without its
details; an answer that is no message of the method; a wrong answer to a right call between rounds; a dead or
complaining server.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from tests.fuzz.calls import GRPC, JSON, OPTIONS, PATIENCE, WEB, Call, Outcome, Sender, fingerprint, make_call
from tests.fuzz.messages import MODELS
from tests.fuzz.methods import Method
from tests.fuzz.pictures import red_square
from tests.fuzz.server import FuzzedServer

CODES = frozenset(
    {
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"),
        *("DEADLINE_EXCEEDED", "PERMISSION_DENIED"),
    }
)
"""What hostile input may lead to. DEADLINE_EXCEEDED only where the call's own deadline was short."""
ROUND = 250
STOP_SECONDS = 5.0
IN_FLIGHT = 16
HEAVY = ("/usagi.vision.", "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStream")
HEAVY_WEIGHT = 8
OURS = ("usagi.", "inference.")
"""Services whose refusals carry details; health and reflection are gRPC's own."""


@dataclass
class Finding:
    """Something that must not happen; `file` has the call."""

    what: str
    call: Call | None
    file: Path | None
    times: int = 1


@dataclass
class Campaign:
    """What an attack saw: calls by method and code, and findings by what they are.

    Args:
        server: under attack.
        methods: all its methods.
        seed: makes the calls.
        target: where the calls go, if not straight to the server.
        ways: how they are sent; JSON and gRPC-Web need the gateway.
        folder: for the calls of findings.
    """

    server: FuzzedServer
    methods: Sequence[Method]
    seed: int
    folder: Path
    target: str = ""
    ways: tuple[str, ...] = (GRPC,)
    calls: int = 0
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    by_method: collections.Counter[str] = field(default_factory=collections.Counter)
    answered: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[str, Finding] = field(default_factory=dict)
    seconds: float = 0.0
    stops: int = 0

    def run(self, first: int, count: int, progress_every: int = 0) -> None:
        """Sends the calls number `first` to `first + count - 1`."""
        asyncio.run(self._run(first, count, progress_every))

    async def _run(self, first: int, count: int, progress_every: int) -> None:
        started = time.monotonic()
        watching = asyncio.create_task(self._watch_for_stops())
        sender = Sender(self.target or self.server.address, {method.path: method for method in self.methods})
        try:
            for begin in range(first, first + count, ROUND):
                end = min(begin + ROUND, first + count)
                calls = [self._call(index) for index in range(begin, end)]
                await self._round(sender, calls)
                if self.server.process.poll() is not None:
                    self._died(calls)
                    return
                await self._check_rightness()
                if progress_every and (end - first) % progress_every < ROUND:
                    print(f"{end - first} calls, {time.monotonic() - started:.0f} s, {self.summary()}", flush=True)
        finally:
            watching.cancel()
            await sender.close()
            self.seconds += time.monotonic() - started
        for line in self.server.complaints()[:20]:
            self._found(f"the log complains: {_generic(line)}", None, line)

    def _call(self, index: int) -> Call:
        rng = random.Random(f"{self.seed}/{index}/method")
        way = rng.choice(self.ways)
        domain = (("usagi-service", "vision"),) if self.target and rng.random() < 0.7 else ()
        methods = [each for each in self.methods if way == GRPC or not each.client_streaming]
        if way != GRPC:
            methods = [each for each in methods if each.service.startswith(OURS)]
        if index % 4 == 0:  # so that few calls are enough for all of them
            return make_call(methods[index // 4 % len(methods)], index, self.seed, way, domain)
        weights = [HEAVY_WEIGHT if method.path.startswith(HEAVY) else 1 for method in methods]
        return make_call(rng.choices(methods, weights)[0], index, self.seed, way, domain)

    async def _round(self, sender: Sender, calls: list[Call]) -> None:
        places = asyncio.Semaphore(IN_FLIGHT)

        async def one(call: Call) -> None:
            async with places:
                stops, outcome = self.stops, await sender.send(call)
                if self._fault(call, outcome) and await self._stopped_since(stops):
                    outcome = await sender.send(call)
            self._judge(call, outcome)

        await asyncio.gather(*(one(call) for call in calls))
        self.calls += len(calls)

    def _judge(self, call: Call, outcome: Outcome) -> None:
        if self.target and call.timeout < PATIENCE and outcome.code == "INTERNAL" and "RST_STREAM" in outcome.message:
            # At the deadline Envoy resets a stream whose answers have begun; mostly the client is quicker.
            outcome = Outcome("DEADLINE_EXCEEDED", outcome.message)
        self.codes[outcome.code] += 1
        self.by_method[call.method] += 1
        if outcome.code == "OK":
            self.answered[call.method] += 1
        what = self._fault(call, outcome)
        if what:
            self._found(f"{call.method}: {what}", call, outcome.message)

    def _fault(self, call: Call, outcome: Outcome) -> str:
        return _fault(call, outcome, next(method for method in self.methods if method.path == call.method))

    async def _watch_for_stops(self) -> None:
        """Counts how often this process stood still, as a niced one does while somebody measures beside it."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.5)
            if time.monotonic() - before > STOP_SECONDS:
                self.stops += 1

    async def _stopped_since(self, stops: int) -> bool:
        await asyncio.sleep(1.0)  # until the watch has seen it
        return self.stops != stops

    async def _check_rightness(self) -> None:
        stops = self.stops
        problem = await asyncio.to_thread(self._wrong)
        if problem and await self._stopped_since(stops):
            problem = await asyncio.to_thread(self._wrong)
        if problem:
            self._found(f"a right call after a round: {problem}", None, "")

    def _found(self, what: str, call: Call | None, message: str) -> None:
        known = self.findings.get(what)
        if known is not None:
            known.times += 1
            return
        file = None
        if call is not None:
            file = self.folder / f"{fingerprint(what)}-{call.index}.json"
            call.save(file, what=what, message=message, seed=self.seed, front=self.server.front, target=self.target)
        self.findings[what] = Finding(what, call, file)

    def _died(self, calls: list[Call]) -> None:
        folder = self.folder / "suspects"
        for call in calls:
            call.save(folder / f"{call.index}.json", seed=self.seed, front=self.server.front, target=self.target)
        end = self.server.log.read_text(errors="replace")[-1000:]
        what = f"the server died with {self.server.process.returncode} in the calls of {folder}; its log ends: {end}"
        self.findings[what] = Finding(what, None, None)

    def _wrong(self) -> str:
        """Reloads the models, straight at the server, and checks right calls the way that the attack goes."""
        try:
            with grpc.insecure_channel(self.server.address, options=OPTIONS) as channel:
                models = model_grpc.ModelServiceStub(channel)
                for name in MODELS:
                    models.UnloadModel(model_pb.UnloadModelRequest(name=name), timeout=PATIENCE)
                    models.LoadModel(model_pb.LoadModelRequest(name=name), timeout=PATIENCE)
            with grpc.insecure_channel(self.target or self.server.address, options=OPTIONS) as channel:
                check_answers(channel)
        except (grpc.RpcError, AssertionError) as error:
            return str(error)[:300]
        return ""

    def summary(self) -> str:
        """Codes, findings and memory in a line."""
        codes = ", ".join(f"{code} {count}" for code, count in self.codes.most_common())
        memory = self.server.memory() if self.server.process.poll() is None else 0
        return f"{codes}; {len(self.findings)} findings; {memory / 1e6:.0f} MB"

    def report(self) -> str:
        """All that a person needs to look further."""
        lines = [f"{self.calls} calls by seed {self.seed}, front {self.server.front}: {self.summary()}"]
        for finding in self.findings.values():
            lines.append(f"- {finding.times} x {finding.what}")
            if finding.file:
                lines.append(f"    again: python -m tests.fuzz --replay {finding.file}")
        return "\n".join(lines)


def _fault(call: Call, outcome: Outcome, method: Method) -> str:
    """What is wrong with an outcome; empty if nothing is."""
    short = call.timeout < PATIENCE
    if outcome.code not in CODES:
        return f"{outcome.code}: {_generic(outcome.message)}"
    if outcome.code == "DEADLINE_EXCEEDED" and not short:
        return "hangs"
    if call.way == JSON:
        return "" if outcome.code == "OK" or outcome.reason else f"{outcome.code} without details"
    for answer in outcome.answers:
        try:
            parsed = method.response.FromString(answer)
        except Exception as error:
            return f"an answer that is no {method.response.DESCRIPTOR.full_name}: {error}"
        inner = _code_inside(parsed)
        if inner not in CODES:
            return f"{inner} inside the stream"
    by_us = method.service.startswith(OURS) and outcome.code not in ("OK", "DEADLINE_EXCEEDED")
    if (
        by_us and not outcome.reason and not call.compression
    ):  # a compression it does not have is the transport's to say
        return f"{outcome.code} without details: {_generic(outcome.message)}"
    return ""


def _code_inside(message: object) -> str:
    """The gRPC code that a message of a stream bears for its own request."""
    if getattr(message, "error_message", ""):  # ModelStreamInferResponse
        return message.infer_response.parameters["error_code"].string_param  # type: ignore[attr-defined]
    error = getattr(message, "error", None)  # ClassifyImagesResponse
    return code_pb2.Code.Name(error.code) if error is not None and hasattr(error, "code") else "OK"


def _generic(text: str) -> str:
    """A message without what differs from call to call, so that the same fault is one finding."""
    try:
        entry = json.loads(text)
        text = f"{entry.get('message')} {entry.get('method', '')} {str(entry.get('exception', ''))[-160:]}"
    except (ValueError, AttributeError):
        pass
    return "".join("#" if letter.isdigit() else letter for letter in text)[:200]


def check_answers(channel: grpc.Channel) -> None:
    """Right calls and their exact answers.

    Raises:
        AssertionError: one is not right.
        grpc.RpcError: one fails.
    """
    header = (("usagi-service", "vision"),)
    stub = pb_grpc.VisionServiceStub(channel)
    request = pb.ClassifyImageRequest(image=red_square(), variant="fp32")
    classified = stub.ClassifyImage(request, timeout=PATIENCE)
    # the mean of the red plane is 255 - 127 over 128 = 1, of the others -127 / 128; times 10
    logits = np.array([10 * 128 / 128, 10 * -127 / 128, 10 * -127 / 128])
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [entry.label for entry in classified.classifications] == ["red", "green", "blue"], classified
    np.testing.assert_allclose([entry.probability for entry in classified.classifications], expected, rtol=1e-5)
    several = [pb.ClassifyImagesRequest(id=str(number), request=request) for number in range(3)]
    streamed = list(stub.ClassifyImages(iter(several), timeout=PATIENCE))
    assert sorted(entry.id for entry in streamed) == ["0", "1", "2"], streamed
    assert all(entry.response.classifications[0].label == "red" for entry in streamed), streamed
    for version, scale in (("1", 2.0), ("2", 3.0)):
        tensor = np.array([[0.5, -1.0, 3e38 / 4, 0.0]], np.float32)
        infer = oip.ModelInferRequest(model_name="affine", model_version=version, raw_input_contents=[tensor.tobytes()])
        infer.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        answer = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer, timeout=PATIENCE, metadata=header)
        assert (
            np.frombuffer(answer.raw_output_contents[0], np.float32).tolist()
            == (tensor * np.float32(scale))[0].tolist()
        )
    health = health_pb2_grpc.HealthStub(channel).Check
    status = health(health_pb2.HealthCheckRequest(), timeout=PATIENCE, metadata=header).status
    assert status == health_pb2.HealthCheckResponse.SERVING


__all__ = ["CODES", "WEB", "Campaign", "check_answers"]
