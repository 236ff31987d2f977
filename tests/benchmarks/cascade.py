"""What the cascade of the flowers costs and changes: `python -m tests.benchmarks.cascade`.

Every photo of a part goes one at a time to int8, to fp32 and to the pipeline of both, in turns, through a real server's
ModelInfer; needs the data set `flowers`.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import grpc
import numpy as np
import tyro
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import load_photos
from shared.artifacts import read_manifest, write_atomically
from shared.serving.config import ServingConfig
from shared.testing.server import running_server

MODEL, PIPELINE = "flowers-efficientnet-lite0", "flowers-cascade"
ROOT = Path("deploy/models")
SHIPPED = "< 0.5"


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Measures the shipped cascade."""

    split: str = "test"
    """Part of the photos: `test`, or `val`, by which a threshold is chosen."""
    thresholds: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Probabilities of int8 below which fp32 is asked; each a pipeline of its own beside the shipped one."""
    photos: int = 0
    """Photos to use; 0 for all of the test part."""
    root: Path = Path("build/cascade")
    """Folder for the pipelines."""


def request_of(photo, model, variant=""):
    request = pb.ModelInferRequest(model_name=model)
    if variant:
        request.parameters["variant"].string_param = variant
    request.inputs.add(name="image", datatype="FP32", shape=photo.shape)
    request.raw_input_contents.append(photo.tobytes())
    return request


def main(config: CascadeConfig) -> None:
    """Prints a table in Markdown."""
    text = (ROOT / "vision" / PIPELINE / "1" / "pipeline.toml").read_text(encoding="utf-8")
    assert text.count(SHIPPED) == 1
    ways = {"int8": (MODEL, "int8"), "fp32": (MODEL, "fp32")}
    for threshold in config.thresholds:
        name = f"cascade-{threshold:g}"
        folder = config.root / "vision" / name / "1"
        write_atomically(folder / "pipeline.toml", text.replace(SHIPPED, f"< {threshold:g}"))
        ways[f"below {threshold:g}"] = (name, "")
    settings = ClassificationPreprocessing.from_dict(read_manifest(ROOT / "vision" / MODEL / "1").preprocessing)
    photos = load_photos(config.split)
    answers = {way: [] for way in ways}
    seconds = {way: [] for way in ways}
    exits = dict.fromkeys(ways, 0)
    serving = ServingConfig(model_roots=(config.root, ROOT), threads=1, log_level="ERROR")
    with running_server("vision", serving) as server, grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for index, tensor in enumerate(photos.tensors(settings)):
            if config.photos and index >= config.photos:
                break
            for way, (model, variant) in ways.items():
                request = request_of(tensor[None], model, variant)
                started = time.perf_counter()
                answer = stub.ModelInfer(request, timeout=30)
                seconds[way].append(time.perf_counter() - started)
                answers[way].append(int(np.frombuffer(answer.raw_output_contents[0], np.float32).argmax()))
                exits[way] += answer.parameters["exit_step"].string_param == "int8"
    count = len(answers["fp32"])
    print(f"{count} photos of {config.split}\n")
    print("| | accuracy | same as fp32 | by int8 alone | mean ms | p50 ms | p95 ms |")
    print(f"|{'---|' * 7}")
    for way, given in answers.items():
        right = np.mean(np.array(given) == photos.labels[:count])
        same = np.mean(np.array(given) == answers["fp32"])
        times = sorted(1000 * value for value in seconds[way])
        alone = f"{exits[way] / count:.3f}" if way.startswith("below") else ""
        print(
            f"| {way} | {right:.4f} | {same:.4f} | {alone} | {statistics.mean(times):.2f} "
            f"| {times[count // 2]:.2f} | {times[int(count * 0.95)]:.2f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(CascadeConfig, description=__doc__))
