"""Memory after 2,000 and after 10,000 right calls is the same, and a leak of 1 KB a call is noticed. `make fuzz`."""

import asyncio
import random

import grpc
import pytest
from grpc_health.v1 import health_pb2
from inference import open_inference_grpc_pb2 as oip
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.vision.v1 import vision_service_pb2 as pb

from shared.serving.front import FRONTS
from tests.fuzz.messages import valid
from tests.fuzz.pictures import red_square
from tests.fuzz.server import fuzzed_server

FIRST, LAST = 2_000, 10_000
IN_FLIGHT = 16
MOST_BYTES = 5_000_000
LEAK = 1_024
RIGHT = (
    ("/usagi.vision.v1.VisionService/ClassifyImage", pb.ClassifyImageRequest(image=red_square(), top_k=2)),
    ("/inference.GRPCInferenceService/ModelInfer", valid(oip.ModelInferRequest, random.Random(1))),
    ("/inference.GRPCInferenceService/ModelInfer", valid(oip.ModelInferRequest, random.Random(3))),
    ("/inference.GRPCInferenceService/ModelMetadata", oip.ModelMetadataRequest(name="affine")),
    ("/inference.GRPCInferenceService/ModelStatistics", oip.ModelStatisticsRequest()),
    ("/usagi.model.v1.ModelService/GetModel", model_pb.GetModelRequest(name="colours")),
    ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest()),
)
"""Calls of the mix, by turns; every tenth is a stream of three pictures."""
STREAM = "/usagi.vision.v1.VisionService/ClassifyImages"


async def call(channel, number):
    if number % 10 == 9:
        picture = pb.ClassifyImagesRequest(id="1", request=RIGHT[0][1]).SerializeToString()
        answers = channel.stream_stream(STREAM)(iter([picture] * 3), timeout=30)
        assert [len(answer) > 0 async for answer in answers] == [True] * 3
        return
    method, request = RIGHT[number % len(RIGHT)]
    await channel.unary_unary(method)(request.SerializeToString(), timeout=30)


async def call_all(address, first, last):
    places = asyncio.Semaphore(IN_FLIGHT)
    async with grpc.aio.insecure_channel(address) as channel:

        async def one(number):
            async with places:
                await call(channel, number)

        for begin in range(first, last, 500):
            await asyncio.gather(*(one(number) for number in range(begin, min(begin + 500, last))))


def growth(folder, front, leak):
    """Bytes by which the server grew between call 2,000 and call 10,000."""
    with fuzzed_server(folder, front, leak=leak) as server:
        asyncio.run(call_all(server.address, 0, FIRST))
        before = server.memory()
        asyncio.run(call_all(server.address, FIRST, LAST))
        after = server.memory()
        change = f"{(after - before) / 1e6:+.2f} after {LAST}"
        print(f"{front}, leak {leak}: {before / 1e6:.1f} MB after {FIRST} calls, {change}")
        assert server.complaints() == []
        return after - before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", FRONTS)
def test_memory_stays(tmp_path, front):
    assert growth(tmp_path, front, 0) < MOST_BYTES


@pytest.mark.timeout(300)
def test_a_leak_of_a_kilobyte_a_call_is_noticed(tmp_path):
    grown = growth(tmp_path, "native", LEAK)
    assert grown >= MOST_BYTES, "else the test above could not fail"
    assert grown < 3 * LEAK * (LAST - FIRST)
