"""A tiny translator of a made-up corpus, trained, exported and published by the real programs; once for all tests."""

import dataclasses
import itertools
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
import tyro

from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training import candidates, evaluate, export, train, validation
from services.nlp.training.data import Pairs
from services.nlp.training.models.transformer import Transformer, TransformerConfig
from shared.data.locate import locate
from shared.errors import ConfigurationError

COLOURS = {"red": "赤い", "blue": "青い", "black": "黒い", "white": "白い"}
ANIMALS = {"cat": "猫", "dog": "犬", "bird": "鳥", "fish": "魚", "horse": "馬"}
VERBS = {"runs": "走る", "sleeps": "眠る", "eats": "食べる", "swims": "泳ぐ", "waits": "待つ"}
ARGUMENTS = [
    "--merges 40 --epochs 20 --batch 16 --learning-rate 1e-2 --width 32 --feed-forward 64 --layers 2 --heads 4",
    "--dropout 0.05 --ema-decay 0.9 --name toy",
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two threads for so little work only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _corpus(request):
    """Tests marked `data` need the real corpus."""
    if request.node.get_closest_marker("data"):
        try:
            locate("enja", download=False)
        except ConfigurationError as error:
            pytest.skip(error.message)


def made_up_pairs():
    """100 sentences: `the red cat runs .` → `赤い 猫 が 走る 。`"""
    pairs = list(itertools.product(COLOURS, ANIMALS, VERBS))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [pairs[index] for index in order]
    return Pairs(
        [["the", *words, "."] for words in chosen],
        [[COLOURS[colour], ANIMALS[animal], "が", VERBS[verb], "。"] for colour, animal, verb in chosen],
    )


@pytest.fixture(scope="session")
def toy_corpus():
    """Puts the made-up corpus where the programs look for the real one: 64 pairs train, 18 validate, 18 are dev."""
    patch = pytest.MonkeyPatch()
    whole = made_up_pairs()
    patch.setattr(train, "divide", lambda division: (whole.take(range(64)), whole.take(range(64, 82))))
    for module in (train, export, candidates, evaluate):
        patch.setattr(module, "load_pairs", lambda part: whole.take(range(82, 100)))
    patch.setattr(validation, "MAX_PIECES", 15)
    patch.setattr(candidates, "LATENCY_SENTENCES", 6)
    patch.setattr(export, "MAX_BLEU_LOSS", 100.0)  # of so few sentences BLEU says nothing: every variant ships
    threads = torch.get_num_threads()
    yield whole
    torch.set_num_threads(threads)
    patch.undo()


def configured(folder, *more):
    """What the command line makes of the arguments."""
    return tyro.cli(train.TrainConfig, args=" ".join([*ARGUMENTS, f"--runs {folder / 'runs'}", *more]).split())


@pytest.fixture(scope="session")
def chain(toy_corpus, tmp_path_factory):
    """`run`: the run's folder; `root`: the models; `graphs`: all that the export wrote; `model`, `vocabularies`, …"""
    folder, patch = tmp_path_factory.mktemp("chain"), pytest.MonkeyPatch()
    config = configured(folder)
    train.main(config)
    write, parities = export.write_graphs, []

    def write_and_keep(model, target):
        parities.append(write(model, target))
        shutil.copytree(target, folder / "graphs")
        return parities[0]

    patch.setattr(export, "write_graphs", write_and_keep)
    measure = candidates.measure_latencies

    def measure_with_room(*arguments, **options):
        """What batch is best depends on what else the machine does; tests count on room for several searches."""
        measured = measure(*arguments, **options)
        return {name: dataclasses.replace(latency, max_batch=32) for name, latency in measured.items()}

    patch.setattr(candidates, "measure_latencies", measure_with_room)
    logging.disable(logging.WARNING)
    try:
        arguments = f"--name toy --runs {folder / 'runs'} --root {folder / 'models'}".split()
        export.main(tyro.cli(export.ExportConfig, args=arguments))
    finally:
        logging.disable(logging.NOTSET)
        patch.undo()
    result = export.read_result(config.folder)
    model = Transformer(TransformerConfig(**result["network"])).eval()
    model.load_state_dict(torch.load(config.folder / "weights.pt", weights_only=True))
    return SimpleNamespace(
        config=config,
        run=config.folder,
        root=folder / "models",
        graphs=folder / "graphs",
        parity=parities[0],
        result=result,
        model=model,
        vocabularies=Vocabularies.from_json((config.folder / "vocabularies.json").read_text(encoding="utf-8")),
    )
