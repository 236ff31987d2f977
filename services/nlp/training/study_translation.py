"""What the course report's mistakes cost: `python -m services.nlp.training.study_translation`.

It measures trained runs on dev in all the ways in which the report counted, each of them labelled, searches with
several beams and length penalties over the exported graphs, and writes a page with tables and a picture of BLEU by
epoch. The runs are those of the commands in the page; one that is not there is left out.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib import pyplot as plt
from torch import Tensor

from services.nlp.serving.predictors import VOCABULARIES
from services.nlp.serving.search import SearchSettings
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.data import load_pairs
from services.nlp.training.decode import greedy
from services.nlp.training.models.transformer import Decoded, Transformer
from services.nlp.training.networks import Network, load_network
from services.nlp.training.offline import OnnxTranslator
from services.nlp.training.plots import COLOURS, save
from services.nlp.training.translator_graphs import graphs_of
from services.nlp.training.validation import REPORT_PIECES, BleuValidator
from shared.artifacts import write_atomically
from shared.errors import ConfigurationError
from shared.training.loop import read_log

LOG = logging.getLogger("usagi.study")
AS_REPORTED = "enja-as-reported"
RUNS = {
    "enja-gru": "GRU",
    "enja-gru-attention": "GRU with attention",
    "enja-report-transformer": "Transformer",
    AS_REPORTED: "Transformer as reported",
}
"""Folders of runs whose vocabularies and division are the report's."""
BEAMS, PENALTIES = (1, 3, 5, 10), (0.0, 0.6, 1.0, 1.3)
STUDY_BEAM, STUDY_PENALTY = 5, 0.6
"""What stays as it is while the other varies."""


@dataclass(frozen=True)
class StudyConfig:
    """Measures what the report's mistakes cost, and writes a page with tables and a picture."""

    runs: Path = Path("runs")
    """Folder of all runs."""
    page: Path = Path("docs/translation-study.md")
    """The page to write; its picture lies in `pictures` beside it."""
    beams: bool = True
    """Search with several beams and penalties too, which takes some minutes."""


@dataclass(frozen=True)
class Measured:
    """BLEU of a run on dev, greedy, in every way of counting.

    Attributes:
        words: free-running, an unknown word never matches: the only honest one.
        ids: free-running, 20 steps, unknown matches unknown: as the report's test.
        cut: the same, no longer than the right translation, which nobody knows.
        shifted: as `ids`, positions counted from one off; None without positions.
        forced: of each next word after the right ones: no translation at all.
    """

    title: str
    seed: int
    command: str
    words: float
    ids: float
    cut: float
    shifted: float | None
    forced: float


@dataclass(frozen=True)
class Shifted:
    """A Transformer that counts positions from one off in decoding, as the report's did."""

    model: Transformer

    def start(self, source: Tensor) -> Decoded:
        """See Stepping."""
        return self.model.start(source, 1 - self.model.first_position)

    def proceed(self, token: Tensor, state: Decoded) -> tuple[Tensor, Decoded]:
        """See Stepping."""
        return self.model.proceed(token, state)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    title: str
    folder: Path
    result: dict[str, Any]
    model: Network
    vocabularies: Vocabularies


def find_runs(config: StudyConfig) -> list[Run]:
    """The finished runs of RUNS, seed by seed.

    Raises:
        ConfigurationError: there is none.
    """
    found = []
    for name, title in RUNS.items():
        for path in sorted((config.runs / name).glob("seed?/result.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            vocabularies = Vocabularies.from_json((path.parent / VOCABULARIES).read_text(encoding="utf-8"))
            found.append(Run(title, path.parent, result, load_network(path.parent, result), vocabularies))
    if not found:
        raise ConfigurationError(f"{config.runs} has none of {', '.join(RUNS)}; train first: docs/translation-study.md")
    return found


def measure(run: Run) -> Measured:
    """All BLEUs of a run."""
    dev = BleuValidator(load_pairs("dev"), run.vocabularies)
    found = greedy(run.model, dev.encoded.source, REPORT_PIECES)
    cut = [ids[: len(target) - 1] for ids, target in zip(found, dev.encoded.target, strict=True)]
    shifted = None
    if isinstance(run.model, Transformer):
        shifted = dev.of_ids(greedy(Shifted(run.model), dev.encoded.source, REPORT_PIECES))
    LOG.info("%s, seed %d measured", run.title, run.result["seed"])
    return Measured(
        title=run.title,
        seed=run.result["seed"],
        command=run.result["command"],
        words=dev(run.model).value,
        ids=dev.of_ids(found),
        cut=dev.of_ids(cut),
        shifted=shifted,
        forced=dev.forced(run.model),
    )


def search(run: Run) -> dict[tuple[int, float], float]:
    """BLEU of words by (beam, length penalty), with serving's search over the exported graphs."""
    graphs = graphs_of(run.model)
    with tempfile.TemporaryDirectory() as folder:
        encoder, step = Path(folder) / "encoder.onnx", Path(folder) / "step.onnx"
        graphs.export_encoder(encoder)
        graphs.export_step(step)
        translator = OnnxTranslator.open(encoder, step, run.vocabularies)
        wanted = [(beam, STUDY_PENALTY) for beam in BEAMS] + [(STUDY_BEAM, penalty) for penalty in PENALTIES]
        found = {}
        for beam, penalty in dict.fromkeys(wanted):
            found[beam, penalty] = translator.bleu(load_pairs("dev"), SearchSettings(beam, length_penalty=penalty))
            LOG.info("%s, beam %d, penalty %g: BLEU %.2f", run.title, beam, penalty, found[beam, penalty])
        return found


def measures_table(measured: Sequence[Measured]) -> str:
    """A row for each run."""
    head = ["", "seed", "words", "ids", "ids, cut", "ids, shifted", "teacher-forced"]
    rows = [
        [one.title, str(one.seed), *map(_bleu, (one.words, one.ids, one.cut, one.shifted, one.forced))]
        for one in measured
    ]
    return _table(head, rows)


def search_table(found: dict[str, dict[tuple[int, float], float]]) -> str:
    """A row for each network, beams first, then penalties."""
    head = ["", *(f"beam {beam}" for beam in BEAMS), *(f"penalty {penalty:g}" for penalty in PENALTIES)]
    places = [(beam, STUDY_PENALTY) for beam in BEAMS] + [(STUDY_BEAM, penalty) for penalty in PENALTIES]
    return _table(head, [[title, *(_bleu(bleus[place]) for place in places)] for title, bleus in found.items()])


def _bleu(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def draw(runs: Sequence[Run], path: Path) -> None:
    """BLEU by epoch of the first seed of each network: free-running in full lines, teacher-forced in broken ones."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    first = {run.title: run for run in reversed(runs)}
    for number, title in enumerate(title for title in RUNS.values() if title in first):
        log = read_log(first[title].folder)
        epochs = [line["epoch"] + 1 for line in log]
        axis.plot(epochs, [line["val_bleu"] for line in log], color=COLOURS[number], marker=".", label=title)
        if "val_forced_bleu" in log[0]:
            axis.plot(epochs, [line["val_forced_bleu"] for line in log], color=COLOURS[number], linestyle=":")
    axis.set(xlabel="epoch", ylabel="BLEU of 500 held-back pairs", ylim=(0, None))
    axis.set_title("free-running (full) and teacher-forced (dotted, no translation)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


PAGE = """# What the report's mistakes cost

Written by `python -m services.nlp.training.study_translation`; do not edit. BLEU of dev's 500 sentences, greedy search.

{measures}

- **words**: the network goes on from its own words, and an unknown word matches nothing. What the cards give.
- **ids**: 20 steps at most, ids compared, so that unknown matches unknown. How the report's test counted: 17.89 for its
  GRU, 26.43 for its Transformer.
- **ids, cut**: no longer than the right translation, whose length nobody knows. How the report validated its GRU.
- **ids, shifted**: positions counted from one off while decoding. What the report's Transformer did.
- **teacher-forced**: each next word after the right ones before it. No translation; the report's 35.90 is such a one.

![BLEU by epoch](pictures/translation_study.svg)

{searches}
## The runs

{commands}
"""
SEARCHES = """## Beams and length penalties

The first seed of each, over words, with serving's search, which never writes an unknown word. Beams at a length penalty
of {penalty:g}, penalties with beam {beam}.

{table}
"""


def study(config: StudyConfig) -> str:
    """Measures, draws, writes the page and returns it.

    Raises:
        ConfigurationError: there is no run.
    """
    torch.set_num_threads(1)
    runs = find_runs(config)
    measured = [measure(run) for run in runs]
    found: dict[str, dict[tuple[int, float], float]] = {}
    for run in runs if config.beams else []:
        if run.title != RUNS[AS_REPORTED] and run.title not in found:
            found[run.title] = search(run)
    draw(runs, config.page.parent / "pictures" / "translation_study.svg")
    searches = SEARCHES.format(penalty=STUDY_PENALTY, beam=STUDY_BEAM, table=search_table(found)) if found else ""
    commands = "\n".join(f"- {one.title}: `{one.command}`" for one in measured)
    page = PAGE.format(measures=measures_table(measured), searches=searches, commands=commands)
    write_atomically(config.page, page)
    return page


def main(config: StudyConfig) -> None:
    """Studies and prints the page."""
    print(study(config))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(StudyConfig, description=__doc__))
