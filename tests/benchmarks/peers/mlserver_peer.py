"""MLServer: every model in one server, the Open Inference Protocol over gRPC, raw tensors.

Best settings of those tried (docs/log.md): no worker processes, graphs in threads, adaptive batching as BATCH says.
"""

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import session

BATCH = {"tiny": 0, "small": 0, "medium": 0}
try:
    from mlserver import MLModel
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceResponse
except ImportError:  # only the process that mlserver starts needs them
    MLModel = object


class OnnxModel(MLModel):
    """A graph, as MLServer's custom runtimes are written."""

    async def load(self):
        self._session = session.open_session(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        array = NumpyCodec.decode_input(payload.inputs[0])
        (answer,) = await asyncio.to_thread(self._session.run, None, {"x": array})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", answer)])


def main():
    """Writes MLServer's settings and starts it."""
    http, grpc, metrics = (session.free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        settings = {
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "parallel_workers": 0,
            "debug": False,
        }
        settings |= {"host": "127.0.0.1", "grpc_max_message_length": 16 * 2**20, "use_structured_logging": False}
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "logging.conf").write_text(LOGGING)
        for model, path in session.graphs().items():
            (folder / model).mkdir()
            wanted = {"name": model, "implementation": "mlserver_peer.OnnxModel", "parameters": {"uri": str(path)}}
            if BATCH[model]:
                wanted |= {"max_batch_size": BATCH[model], "max_batch_time": 0.001}
            (folder / model / "model-settings.json").write_text(json.dumps(wanted))
        environment = {
            **os.environ,
            "PYTHONPATH": str(pathlib.Path(__file__).parent),
            "MLSERVER_LOGGING_SETTINGS": str(folder / "logging.conf"),
        }
        command = [str(pathlib.Path(sys.executable).parent / "mlserver"), "start", str(folder)]
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr, cwd=folder)
        session.wait_for(f"http://127.0.0.1:{http}/v2/health/ready", process)
        call = {"target": f"127.0.0.1:{grpc}", "path": "/inference.GRPCInferenceService/ModelInfer", "body": "oip"}
        session.announce("mlserver", dict.fromkeys(session.graphs(), call), [process])


LOGGING = """[loggers]
keys=root
[handlers]
keys=none
[formatters]
keys=
[logger_root]
level=ERROR
handlers=none
[handler_none]
class=NullHandler
args=()
"""

if __name__ == "__main__":
    main()
