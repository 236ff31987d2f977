"""10,000 hostile calls over every RPC: both fronts, and the real gateway with gRPC-Web and JSON. `make fuzz`."""

import pytest

from tests.fuzz.calls import GRPC, JSON, WEB
from tests.fuzz.campaign import CODES, Campaign
from tests.fuzz.gateway import gateway_before
from tests.fuzz.methods import enumerate_methods
from tests.fuzz.server import ROOT, fuzzed_server

SEED = 20261124
FINDINGS = ROOT / "out/fuzz"
ALWAYS_SEEN = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}
"""Codes that an attack of this size cannot miss: without them it did not reach what it attacks."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("front", "first", "calls", "gateway"),
    [("native", 0, 4_500, False), ("grpcio", 4_500, 3_500, False), ("native", 8_000, 2_000, True)],
    ids=["native", "grpcio", "gateway"],
)
def test_hostile_calls(tmp_path, front, first, calls, gateway):
    with fuzzed_server(tmp_path, front) as server:
        methods = enumerate_methods(server.address)
        assert {method.path for method in methods} == server.registered(), "reflection tells every method"
        if gateway:
            with gateway_before(server) as target:
                campaign = Campaign(server, methods, SEED, FINDINGS, target, (GRPC, GRPC, WEB, JSON))
                campaign.run(first, calls)
        else:
            campaign = Campaign(server, methods, SEED, FINDINGS)
            campaign.run(first, calls)
        print(campaign.report())
        assert server.process.poll() is None
    assert not campaign.findings, campaign.report()
    assert campaign.calls == calls
    assert {method.path for method in methods} == set(campaign.by_method), "every method was called"
    assert ALWAYS_SEEN <= set(campaign.codes) <= CODES
