"""What the environment sets for every serving process (`USAGI_<FIELD>`); a service adds fields in a subclass."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_ROOTS = (Path("var/models"), Path("deploy/models"))


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Configuration of a serving process.

    Attributes:
        host: address to listen on.
        port: gRPC port; 0 picks a free one.
        metrics_port: Prometheus port; 0 switches it off.
        model_roots: searched in order, the writable one first.
        trusted_keys: files with public keys; with any, only versions that one of them signed are served.
        rescan_seconds: how often new versions are looked for.
        front: what takes the calls: `native` or `grpcio`; see shared/serving/front.py.
        queue_size: requests that may wait for each model besides the batches that run.
        model_memory_mb: what the sessions of all models together may hold, in MB of 10^6 bytes; 0 means no limit.
        threads: threads that run graphs; 0 means the CPU quota rounded up.
        intra_op_threads: ONNX Runtime threads of each run; 1 is best under load.
        providers: what runs the graphs, first the preferred one: `cpu`, `cuda`, `cuda,cpu`; see providers.py.
        upstreams: where the steps of pipelines find other domains: `local` (on this machine) or `network` (by name).
        max_message_bytes: limit of one message, the same in client, gateway and services.
        keys_file: file of the API keys (shared/api_keys.py), for the administrative methods; empty for none.
        keys_required: a missing file lets nobody use these, instead of callers on this machine.
        drain_seconds: after SIGTERM, how long to answer as before while the gateway notices NOT_SERVING.
        grace_seconds: how long running calls may take after that.
        reflection: whether to offer gRPC server reflection.
        log_level: DEBUG, INFO, WARNING or ERROR.
        replica: name of this process in logs and answers.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 9464
    model_roots: tuple[Path, ...] = DEFAULT_ROOTS
    trusted_keys: tuple[Path, ...] = ()
    rescan_seconds: float = 2.0
    front: str = "native"
    queue_size: int = 100
    model_memory_mb: int = 0
    threads: int = 0
    intra_op_threads: int = 1
    providers: str = "cpu"
    upstreams: str = "local"
    max_message_bytes: int = 16 * 1024 * 1024
    keys_file: str = ""
    keys_required: bool = False
    drain_seconds: float = 0.0
    grace_seconds: float = 20.0
    reflection: bool = True
    log_level: str = "INFO"
    replica: str = field(default_factory=socket.gethostname)

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"USAGI_{name.upper()}={getattr(self, name)} is not a port, 0 to 65535")
        if self.queue_size < 0 or self.threads < 0 or self.intra_op_threads < 1:
            raise ValueError("USAGI_QUEUE_SIZE and USAGI_THREADS must be 0 or more, USAGI_INTRA_OP_THREADS 1 or more")
        if self.model_memory_mb < 0:
            raise ValueError(f"USAGI_MODEL_MEMORY_MB={self.model_memory_mb} must be 0 or more")
        if self.rescan_seconds <= 0:
            raise ValueError(f"USAGI_RESCAN_SECONDS={self.rescan_seconds} must be above 0")
        if self.front not in {"native", "grpcio"}:
            raise ValueError(f"USAGI_FRONT={self.front} is not native or grpcio")
        if self.upstreams not in {"local", "network"}:
            raise ValueError(f"USAGI_UPSTREAMS={self.upstreams} is not local or network")
        if self.log_level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError(f"USAGI_LOG_LEVEL={self.log_level} is not DEBUG, INFO, WARNING or ERROR")
