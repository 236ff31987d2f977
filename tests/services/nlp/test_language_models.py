"""The programs that train, export and check a language model, on a made-up text, in pieces."""

import json
from pathlib import Path

import pytest
import tyro

from services.nlp.tokenizers.text_bpe import TextBytePairTokenizer
from services.nlp.training import evaluate, export_gpt, texts, train_gpt
from services.nlp.training.tasks import Permutations
from shared.artifacts import read_manifest

SHIPPED = Path(__file__).parents[3] / "deploy" / "models" / "nlp"
LINES = ["the cat sat on the mat.\n", "the dog lay on the rug.\n", "a bird sang in the tree!\n"]


@pytest.fixture
def made_up_text(monkeypatch):
    """300 lines where the programs look for a corpus; an epoch has 20 steps."""
    whole = "".join(LINES[number * number % 7 % 3] for number in range(300))
    monkeypatch.setattr(texts, "load_text", lambda name: whole)
    monkeypatch.setattr(train_gpt, "STEPS_PER_EPOCH", 20)
    monkeypatch.setattr(train_gpt, "VALIDATION_WINDOWS", 8)
    monkeypatch.setattr(export_gpt, "MAX_RISE", 9.0)  # after so few steps every variant is to ship


def test_train_export_and_check(made_up_text, tmp_path):
    arguments = f"--merges 30 --epochs 2 --batch 8 --context 32 --width 32 --layers 1 --runs {tmp_path / 'runs'}"
    config = tyro.cli(train_gpt.TrainGptConfig, args=arguments.split())
    train_gpt.main(config)
    result = json.loads((config.folder / "result.json").read_text())
    assert result["nats"] < result["baselines"]["uniform"]
    again = tyro.cli(train_gpt.TrainGptConfig, args=[*config.command.split()[3:], "--runs", str(config.runs)])
    assert again == config
    place = ["--runs", str(config.runs), "--root", str(tmp_path / "models")]
    exporting = tyro.cli(export_gpt.ExportGptConfig, args=["--pieces", *place])
    folder = export_gpt.export(exporting)
    manifest = read_manifest(folder)
    assert manifest.name == "shakespeare-bpe-gpt"
    assert manifest.training.command == f"{config.command} && {exporting.command}"
    assert manifest.variants["fp16"].metrics["nats"] == pytest.approx(result["nats"], abs=0.01)
    tokenizer = evaluate.read_text_tokenizer((folder / "vocabulary.json").read_text(encoding="utf-8"))
    assert type(tokenizer) is TextBytePairTokenizer
    assert not any(check.problem for check in evaluate.check_version(folder))


def test_pieces_are_measured_by_the_character(made_up_text, tmp_path):
    """Half as many tokens that each cost twice as much are no worse: the baselines are those of characters too."""
    configs = [train_gpt.TrainGptConfig(merges=merges, runs=tmp_path) for merges in (0, 30)]
    assert train_gpt.character_baselines(configs[0]) == train_gpt.character_baselines(configs[1])
    tokenizer, _, held = train_gpt.divide(configs[1])
    assert train_gpt.token_lengths(tokenizer)[held].sum() == len(texts.held_back_text("shakespeare"))


class TestShipped:
    """The gates of the models that ship, by their manifests, which `make verify` measures again."""

    @staticmethod
    def metrics(name, variant):
        return read_manifest(SHIPPED / name / "1").variants[variant].metrics

    @pytest.mark.parametrize(("name", "least"), [("shakespeare-gpt", 0.7), ("soseki-gpt", 0.5)])
    def test_a_language_model_beats_the_character_before_it(self, name, least):
        baselines = read_manifest(SHIPPED / name / "1").training.baselines
        assert baselines["uniform"] > baselines["unigram"] > baselines["bigram"]
        assert self.metrics(name, "fp16")["nats"] < baselines["bigram"] - least
        assert self.metrics(name, "int8")["nats"] <= self.metrics(name, "fp16")["nats"] + export_gpt.MAX_RISE

    def test_shakespeare_takes_at_most_1_75_nats_a_character(self):
        assert self.metrics("shakespeare-gpt", "int8")["nats"] <= 1.75

    @pytest.mark.parametrize("variant", ["fp16", "int8"])
    def test_the_adder_is_exact_on_99_of_100_sums_it_never_saw(self, variant):
        assert self.metrics("adder-gpt", variant)["exact_match"] >= 0.99
        assert read_manifest(SHIPPED / "adder-gpt" / "1").training.wall_seconds <= 600

    @pytest.mark.parametrize("variant", ["fp16", "int8"])
    def test_more_examples_help_and_more_than_by_repeating_what_was_seen(self, variant):
        metrics = self.metrics("fewshot-gpt", variant)
        by_shots = [metrics[f"accuracy_{shots}_shots"] for shots in Permutations.shots]
        assert by_shots == sorted(by_shots)
        assert by_shots[0] == pytest.approx(1 / 6, abs=0.05)  # one guess a letter over 144 functions: deviation .013
        for shots, accuracy in zip(Permutations.shots[3:], by_shots[3:], strict=True):
            assert accuracy > 1 - (5 / 6) ** (shots + 1) + 0.03
