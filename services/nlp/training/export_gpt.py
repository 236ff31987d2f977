"""Exports a trained language model and publishes it: `python -m services.nlp.training.export_gpt --text shakespeare`.

One graph reads a prompt and makes steps; variants as of the translators. int8 ships if its loss on the held-back text
is at most 0.02 nats a character above that of `fp16`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
import tyro
from numpy.typing import NDArray

from services.nlp.serving.generator import GENERATION, VOCABULARY
from services.nlp.tokenizers.texts import read_text_tokenizer
from services.nlp.training.graphs import GptGraph, export_gpt, gpt_examples
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.offline import onnx_held_out_loss
from services.nlp.training.publishing import (
    REFERENCE,
    asset,
    describe,
    publish_graphs,
    read_result,
    write_variants,
)
from services.nlp.training.texts import TEXTS, held_back_text
from services.nlp.training.train_gpt import model_name
from shared.artifacts import Manifest, TrainingRecord
from shared.data.catalog import DATASETS
from shared.errors import ConfigurationError
from shared.measures import measure_named
from shared.training.export import PARITY_TOLERANCE, open_session, opset_of, tensor_specs
from shared.training.latency import measure_latencies
from shared.training.machine import cpu_name, spread

LOG = logging.getLogger("usagi.export")
MAX_RISE = 0.02


@dataclass(frozen=True)
class ExportGptConfig:
    """Exports a trained language model to ONNX, compresses it, and publishes it with its manifest."""

    text: Literal["shakespeare", "soseki"] = "shakespeare"
    """What the run read."""
    pieces: bool = False
    """The model that reads pieces of byte-pair encoding, not the one that reads characters."""
    seed: int = 0
    """Seed of the run to ship."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    root: Path = Path("var/models")
    """Model root to publish into; `deploy/models` holds what the images are built with."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    quick: bool = False
    """Export a `--quick` run; the card is not copied to `services/nlp/cards`."""

    @property
    def name(self) -> str:
        """Of the model."""
        return model_name(self.text, pieces=self.pieces)

    @property
    def run_folder(self) -> Path:
        """Where the run to ship lives."""
        return self.runs / self.name / (f"seed{self.seed}" + ("-quick" if self.quick else ""))

    @property
    def command(self) -> str:
        """The command line that exports this run again, without paths of the machine."""
        words = ["python -m services.nlp.training.export_gpt", f"--text {self.text}", f"--seed {self.seed}"]
        words += ["--pieces"] if self.pieces else []
        words += [f"--version {self.version}"] if self.version != 1 else []
        return " ".join([*words, "--quick"] if self.quick else words)


@dataclass(frozen=True)
class GptRelease:
    """What is particular to one language model: all of its manifest that its network does not tell.

    Attributes:
        measure_variant: the metrics of an open graph, `measure` among them.
        margin: by how much a variant may be worse than `fp16`.
    """

    name: str
    version: int
    description: str
    preprocessing: Mapping[str, Any]
    measure: str
    measure_variant: Callable[[ort.InferenceSession], dict[str, float]]
    margin: float
    training: TrainingRecord


def export(config: ExportGptConfig) -> Path:
    """Exports, measures, judges and publishes a run; returns the folder of the published version.

    Raises:
        ConfigurationError: the run is not finished, or the export differs from PyTorch.
    """
    result = read_result(config.run_folder)
    vocabulary = (config.run_folder / VOCABULARY).read_text(encoding="utf-8")
    model = load_model(config.run_folder, result)
    tokenizer, held, context = read_text_tokenizer(vocabulary), held_back_text(config.text), model.config.context
    unit = "pieces" if config.pieces else "characters"

    def measure_variant(session: ort.InferenceSession) -> dict[str, float]:
        nats = onnx_held_out_loss(session, tokenizer, held, context)
        return {"nats": nats, "perplexity": float(np.exp(nats)), "held_back_characters": float(len(held))}

    size = f"{model.config.layers} layers of {model.config.width}, {context} {unit} in sight"
    release = GptRelease(
        name=config.name,
        version=config.version,
        description=f"Continues text as {TEXTS[config.text].title} would: GPT over {unit}, {size}. "
        "Times are those of one step of one row.",
        preprocessing={"context": context, "text": config.text},
        measure="nats",
        measure_variant=measure_variant,
        margin=MAX_RISE,
        training=_record(config, result),
    )
    return publish_gpt(release, model, vocabulary, config.root, bundled=not config.quick)


def load_model(folder: Path, result: Mapping[str, Any]) -> Gpt:
    """The network of a finished run."""
    torch.set_num_threads(1)
    model = Gpt(GptConfig(**result["network"])).eval()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model


def publish_gpt(release: GptRelease, model: Gpt, vocabulary: str, root: Path, *, bundled: bool) -> Path:
    """Exports a network, measures and judges its variants, and publishes those that pass.

    Raises:
        ConfigurationError: the export differs from PyTorch.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "gpt.onnx"
        export_gpt(model, source)
        parity = check_gpt(model, source)
        paths = write_variants(source, Path(folder), "gpt")
        manifest = _manifest(release, model, paths, vocabulary, parity)
        return publish_graphs(root, manifest, paths, {VOCABULARY: vocabulary.encode()}, bundled=bundled)


def check_gpt(model: Gpt, path: Path) -> float:
    """Largest difference between the graph and PyTorch, over several numbers of rows, of new and of cached positions.

    Raises:
        ConfigurationError: it is above PARITY_TOLERANCE; the export is wrong.
    """
    session = open_session(path)
    worst = 0.0
    with torch.inference_mode():
        quarter = model.config.context // 4
        for rows, new, past in ((1, 1, 1), (2, quarter + 1, quarter), (5, 1, 3 * quarter)):
            tokens, position, cache = gpt_examples(model, rows=rows, new=new, past=past)
            inputs = (tokens, position, *cache)
            feeds = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
            for one, other in zip(GptGraph(model)(tokens, position, cache), session.run(None, feeds), strict=True):
                worst = max(worst, float(np.abs(one.numpy() - other).max()))
    if not worst <= PARITY_TOLERANCE:
        raise ConfigurationError(f"the exported graph differs from PyTorch by {worst:.2e}")
    return worst


def _manifest(release: GptRelease, model: Gpt, paths: Mapping[str, Path], vocabulary: str, parity: float) -> Manifest:
    sessions = {name: open_session(path) for name, path in paths.items()}
    measured = {name: release.measure_variant(session) for name, session in sessions.items()}
    latencies = measure_latencies(
        {name: _step(session, model.config.context // 2) for name, session in sessions.items()},
        np.zeros((1, 1), np.float32),
    )
    LOG.info("%s: %s", release.name, measured)
    measure = measure_named(release.measure)
    reference = measured[REFERENCE][measure.name]
    shipped = [name for name in paths if measure.loss(reference, measured[name][measure.name]) <= release.margin]
    graph = onnx.load(str(paths[REFERENCE])).graph
    metrics = {
        name: {
            **measured[name],
            "latency_p50_ms": latencies[name].p50_ms,
            "latency_p95_ms": latencies[name].p95_ms,
            **({"parity_max_abs_diff": parity} if name == REFERENCE else {}),
        }
        for name in shipped
    }
    return Manifest(
        service="nlp",
        name=release.name,
        version=release.version,
        task=GENERATION,
        description=release.description,
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        variants={name: describe(name, paths[name], metrics[name], latencies[name]) for name in shipped},
        preprocessing=release.preprocessing,
        opset=opset_of(paths[REFERENCE]),
        training=release.training,
        measure=release.measure,
        assets={VOCABULARY: asset(vocabulary.encode())},
    )


def _step(session: Any, past: int) -> Any:
    """One step of as many rows as the batch has, in the middle of a window."""

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = len(batch)
        feeds: dict[str, NDArray[Any]] = {
            "tokens": np.full((rows, 1), 10, np.int64),
            "position": np.full(rows, past, np.int64),
        }
        for entry in session.get_inputs():
            if len(entry.shape) == 4:
                feeds[entry.name] = np.ones((rows, entry.shape[1], past, entry.shape[3]), np.float32)
        return np.asarray(session.run(["log_probabilities"], feeds)[0])

    return predict


def _record(config: ExportGptConfig, result: dict[str, Any]) -> TrainingRecord:
    dataset = DATASETS[TEXTS[config.text].dataset]
    runs = [read_result(path.parent) for path in sorted(config.run_folder.parent.glob("seed*/result.json"))]
    recipe = str(result["command"]).replace(f"--seed {result['seed']}", "")
    same = [run for run in runs if str(run["command"]).replace(f"--seed {run['seed']}", "") == recipe]
    return TrainingRecord(
        command=f"{result['command']} && {config.command}",
        seed=config.seed,
        data=f"{dataset.description}; {dataset.source_url}; the last tenth of the text is held back",
        data_licence=dataset.licence,
        device=cpu_name(),
        wall_seconds=result["wall_seconds"],
        baselines=result["baselines"],
        spread={"nats": spread([run["nats"] for run in same])} if len(same) > 1 else {},
    )


def main(config: ExportGptConfig) -> None:
    """Publishes and says where."""
    print(f"published {export(config)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportGptConfig, description=__doc__))
