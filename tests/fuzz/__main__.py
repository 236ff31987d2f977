"""By hand: `python -m tests.fuzz --calls 1000000`, or one call again: `python -m tests.fuzz --replay FILE`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path

from shared.serving.front import FRONTS
from tests.fuzz.calls import GRPC, JSON, WEB, Call, Sender
from tests.fuzz.campaign import Campaign
from tests.fuzz.gateway import gateway_before
from tests.fuzz.methods import enumerate_methods
from tests.fuzz.server import fuzzed_server


def main() -> int:
    """Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--front", choices=FRONTS, default="native")
    parser.add_argument("--gateway", action="store_true", help="through the real gateway; gRPC-Web and JSON too")
    parser.add_argument("--log-level", default="WARNING", help="of the server (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="folder for findings (default: %(default)s)")
    parser.add_argument("--replay", type=Path, help="send the call in this file and print what comes back")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(fuzzed_server(folder, options.front, log_level=options.log_level))
        methods = enumerate_methods(server.address)
        target, ways = "", (GRPC,)
        if options.gateway:
            target, ways = stack.enter_context(gateway_before(server)), (GRPC, GRPC, WEB, JSON)
        campaign = Campaign(server, methods, options.seed, options.out, target, ways)
        started = server.memory()
        campaign.run(options.first, options.calls, progress_every=max(1_000, options.calls // 20))
        print(campaign.report())
        if server.process.poll() is None:
            now, most = server.memory(), server.memory("VmHWM")
            memory = f"{started / 1e6:.0f} before, {now / 1e6:.0f} after, {most / 1e6:.0f} at most"
            print(f"{campaign.calls / campaign.seconds:.0f} calls/s; MB: {memory}")
        for method in methods:
            print(
                f"{campaign.by_method[method.path]:8} calls {campaign.answered[method.path]:8} answered  {method.path}"
            )
        return 1 if campaign.findings else 0


def replay(file: Path) -> int:
    """Sends one call again, to a server of its own."""
    call, about = Call.load(file)
    print(f"{call.method} by {call.way}, {call.done}; then: {about.get('what')}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(fuzzed_server(folder, str(about["front"])))
        methods = {method.path: method for method in enumerate_methods(server.address)}
        target = stack.enter_context(gateway_before(server)) if about.get("target") else server.address

        async def send() -> None:
            sender = Sender(target, methods)
            outcome = await sender.send(call)
            await sender.close()
            print(f"{outcome.code} {outcome.message[:2000]}\n{str(outcome.status or '')[:2000]}")

        asyncio.run(send())
        print("\n".join(server.complaints()) or "the log does not complain")
        if server.process.poll() is not None:
            print(f"the server died with {server.process.returncode}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
