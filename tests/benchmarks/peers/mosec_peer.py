"""mosec: one server a model, tensors as raw bytes over HTTP/1.1. With PEER_GRAPH set, one of those servers.

Best settings of those tried (docs/log.md): WORKERS processes of one thread, batches of up to 16, no waiting for more.
"""

import os
import subprocess
import sys

import numpy as np
import session
from mosec import Server, Worker

SHAPES = {"tiny": (4,), "small": (3, 96, 96), "medium": (3, 224, 224)}
BATCH = {"tiny": 32, "small": 8, "medium": 4}
WORKERS = int(os.environ.get("PEER_WORKERS", "2"))


class Graph(Worker):
    """A graph, as mosec's workers are written; they are processes that read their model from the environment."""

    def __init__(self):
        super().__init__()
        self.session = session.open_session(os.environ["PEER_GRAPH"])
        self.shape = SHAPES[os.environ["PEER_MODEL"]]

    def deserialize(self, data):
        return np.frombuffer(data, np.float32).reshape(self.shape)

    def forward(self, data):
        (answer,) = self.session.run(None, {"x": np.stack(data)})
        return list(answer)

    def serialize(self, data):
        return data.tobytes()


def serve(model):
    """Runs the server of one model; mosec reads its own options from the command line."""
    server = Server()
    server.append_worker(Graph, num=WORKERS, max_batch_size=BATCH[model], max_wait_time=1)
    server.run()


def main():
    """Starts a server for each graph."""
    models, processes, ports = {}, [], {}
    for model, path in session.graphs().items():
        ports[model] = session.free_port()
        command = [sys.executable, __file__, "--port", str(ports[model]), "--log-level", "warning"]
        environment = {**os.environ, "PEER_GRAPH": str(path), "PEER_MODEL": model}
        processes.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
    for (model, port), process in zip(ports.items(), processes, strict=True):
        session.wait_for(f"http://127.0.0.1:{port}/metrics", process)
        models[model] = {"target": f"127.0.0.1:{port}", "path": "/inference", "body": "raw"}
    session.announce("mosec", models, processes)


if __name__ == "__main__":
    if "PEER_GRAPH" in os.environ:
        serve(os.environ["PEER_MODEL"])
    else:
        main()
