"""The programs that train, export and check a translator, on a made-up corpus; and what is shipped."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

from services.nlp.serving.predictors import VOCABULARIES
from services.nlp.tokenizers.bpe import BytePairTokenizer
from services.nlp.tokenizers.words import WordTokenizer
from services.nlp.training import evaluate, export, train
from services.nlp.training.data import PairBatches, encode_pairs, padded, shifted
from services.nlp.training.decode import greedy
from services.nlp.training.losses import token_cross_entropy
from shared.artifacts import CARD_NAME, MANIFEST_NAME, read_assets, read_manifest, verify_variant
from shared.errors import ConfigurationError
from shared.training.card import render_card

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "deploy" / "models"


def weights_of(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def log_of(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "wall_seconds"} for line in lines]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestTrain:
    def test_a_tiny_network_learns_64_pairs_by_heart(self, chain, toy_corpus):
        pairs = toy_corpus.take(range(64))
        encoded = encode_pairs(pairs, chain.vocabularies)
        target = padded(encoded.target)
        with torch.inference_mode():
            loss = token_cross_entropy()(chain.model((padded(encoded.source), shifted(target))), target)
        assert loss.item() < 1.0  # nats a token; ln 32 = 3.5 without learning
        found = [chain.vocabularies.japanese.decode(ids) for ids in greedy(chain.model, encoded.source, 15)]
        assert sum(one == other for one, other in zip(found, pairs.japanese, strict=True)) >= 60

    def test_the_run_folder_says_all(self, chain):
        assert {path.name for path in chain.run.iterdir()} >= {
            "weights.pt", "best.pt", "last.pt", "result.json", "metrics.jsonl", "curves.png", VOCABULARIES,
        }  # fmt: skip
        log = log_of(chain.run)
        assert [line["epoch"] for line in log] == list(range(chain.config.epochs))
        best = max(log, key=lambda line: line["val_bleu"])
        assert chain.result["best_epoch"] == best["epoch"]
        assert chain.result["val_bleu"] == pytest.approx(best["val_bleu"], abs=1e-3)
        assert chain.result["network"]["width"] == 32
        assert chain.result["command"] == chain.config.command
        assert same(weights_of(chain.run), torch.load(chain.run / "best.pt", weights_only=True))

    def test_an_interrupted_run_ends_as_if_it_had_not_been(self, chain, toy_corpus, tmp_path, monkeypatch):
        config = dataclasses.replace(chain.config, epochs=3, dropout=0.2, runs=tmp_path / "whole")
        train.train(config)
        broken = dataclasses.replace(config, runs=tmp_path / "broken")

        class Interrupted(Exception):
            pass

        real = PairBatches.batch
        for where in ((0, 2), (1, 3), (2, 0), (2, 1)):

            def batch(self, epoch, step, where=where):
                if (epoch, step) == where:
                    raise Interrupted
                return real(self, epoch, step)

            with monkeypatch.context() as patch:
                patch.setattr(PairBatches, "batch", batch)
                with pytest.raises(Interrupted):
                    train.train(broken)
            assert not (broken.folder / "result.json").exists()
        torch.manual_seed(99)  # whatever happened in between
        train.train(broken)
        assert same(weights_of(config.folder), weights_of(broken.folder))
        assert log_of(config.folder) == log_of(broken.folder)
        again = train.train(broken)  # nothing is left to do
        assert again["val_bleu"] == json.loads((config.folder / "result.json").read_text())["val_bleu"]
        with pytest.raises(ConfigurationError, match="another configuration"):
            train.train(dataclasses.replace(broken, learning_rate=1e-4))

    def test_the_seed_decides(self, chain, toy_corpus, tmp_path):
        weights = []
        for seed in (0, 1):
            config = dataclasses.replace(chain.config, epochs=1, seed=seed, runs=tmp_path)
            train.train(config)
            assert config.folder == tmp_path / "toy" / f"seed{seed}"
            weights.append(weights_of(config.folder))
        assert not same(*weights)

    def test_whole_words_and_bfloat16(self, chain, toy_corpus, tmp_path):
        config = dataclasses.replace(chain.config, epochs=1, merges=0, bfloat16=True, runs=tmp_path)
        result = train.train(config)
        vocabularies = train.load_vocabularies(config, toy_corpus)
        assert isinstance(vocabularies.english, WordTokenizer)
        assert isinstance(chain.vocabularies.english, BytePairTokenizer)
        assert result["network"]["source_vocabulary"] == len(vocabularies.english)
        assert all(torch.isfinite(weight).all() for weight in weights_of(config.folder).values())

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"seed": 3, "merges": 0, "division": "report", "name": "other"},
            {"bfloat16": True, "quick": True, "epochs": 2, "learning_rate": 5e-4, "dropout": 0.0, "threads": 2},
        ],
    )
    def test_the_recorded_command_makes_the_same_run(self, changes):
        config = train.TrainConfig(**changes)
        words = config.command.split()
        assert words[:3] == ["python", "-m", "services.nlp.training.train"]
        assert tyro.cli(train.TrainConfig, args=words[3:]) == config

    def test_the_tests_of_the_corpus_never_train(self, chain, toy_corpus):
        """The vocabularies are those of the training part alone."""
        learnt = train.make_vocabularies(toy_corpus.take(range(64)), 40)
        assert chain.vocabularies.to_json() == learnt.to_json()


def judge(root):
    text = io.StringIO()
    good = evaluate.evaluate(evaluate.EvaluateConfig(root), Console(file=text, width=300))
    return good, text.getvalue()


@pytest.fixture
def copied(chain, tmp_path):
    shutil.copytree(chain.root, tmp_path / "models")
    return tmp_path / "models"


def rewrite(folder, change):
    """Changes a manifest, and the card with it, so that only what is claimed is wrong."""
    path = folder / MANIFEST_NAME
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(render_card(read_manifest(folder)), encoding="utf-8")


class TestExport:
    @pytest.mark.parametrize("part", ["toy", "toy-step"])
    def test_what_is_published_verifies(self, chain, part):
        folder = chain.root / "nlp" / part / "1"
        manifest = read_manifest(folder)
        assert list(manifest.variants) == ["fp16", "int8"]
        for variant in manifest.variants.values():
            verify_variant(folder, variant)
            assert variant.metrics["bleu"] >= 0
            assert 1 <= variant.max_batch <= 32
            assert 0 < variant.metrics["latency_p50_ms"] <= variant.metrics["latency_p95_ms"]
        assert manifest.variants["fp16"].metrics["parity_max_abs_diff"] == pytest.approx(chain.parity, rel=0.5)
        assert (folder / CARD_NAME).read_text(encoding="utf-8") == render_card(manifest)
        assert set(read_assets(folder, manifest)) == ({VOCABULARIES} if part == "toy" else set())
        exported = "python -m services.nlp.training.export --seed 0 --name toy"
        assert manifest.training.command == f"{chain.config.command} && {exported}"
        assert (manifest.service, manifest.measure, manifest.version) == ("nlp", "bleu", 1)
        assert manifest.task == ("translation" if part == "toy" else "translation-step")

    def test_shapes_leave_free_what_varies(self, chain):
        encoder, step = (read_manifest(chain.root / "nlp" / part / "1") for part in ("toy", "toy-step"))
        assert [(spec.name, spec.shape) for spec in encoder.inputs] == [("source", (-1, -1))]
        assert {spec.shape for spec in encoder.outputs} == {(-1, 4, -1, 8)}
        assert [spec.shape for spec in step.inputs] == [(-1,)] * 3 + [(-1, 4, -1, 8)] * 8
        assert [spec.name for spec in encoder.outputs] == [spec.name for spec in step.inputs[7:]]
        assert step.outputs[0].shape == (-1, len(chain.vocabularies.japanese))

    def test_a_run_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigurationError, match="train first"):
            export.export(export.ExportConfig(runs=tmp_path, root=tmp_path))

    @pytest.mark.parametrize(
        ("bleu", "bytes_", "ms", "verdict"),
        [
            (30.0, 50, 1.0, True),
            (29.51, 50, 2.0, True),
            (29.49, 50, 0.1, False),  # loses more than half a point
            (30.0, 100, 1.0, False),  # neither smaller nor faster
            (30.0, 100, 0.5, True),
            (31.0, 120, 2.0, False),
        ],
    )
    def test_what_ships(self, tmp_path, monkeypatch, bleu, bytes_, ms, verdict):
        monkeypatch.setattr(export, "MAX_BLEU_LOSS", 0.5)

        def candidate(name, bleu, size, milliseconds):
            path = tmp_path / name
            path.write_bytes(bytes(size))
            return export.Candidate(path, path, {"bleu": bleu}, None, None, (milliseconds, milliseconds))

        reference = candidate("fp16", 30.0, 100, 1.0)
        assert export.ships(reference, reference)
        assert export.ships(candidate("int8", bleu, bytes_, ms), reference) is verdict


class TestEvaluate:
    def test_what_is_right_passes(self, chain, toy_corpus):
        good, text = judge(chain.root)
        assert good, text
        assert text.count("as claimed") == 4
        with pytest.raises(SystemExit) as ended:
            evaluate.main(evaluate.EvaluateConfig(chain.root))
        assert ended.value.code == 0

    @pytest.mark.parametrize(
        "file",
        [
            *("toy/1/model.fp16.onnx", "toy/1/model.int8.onnx", f"toy/1/{VOCABULARIES}"),
            *("toy-step/1/model.fp16.onnx", "toy-step/1/model.int8.onnx"),
        ],
    )
    def test_one_bit_of_a_file(self, copied, toy_corpus, file):
        path = copied / "nlp" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        good, text = judge(copied)
        assert not good
        assert "is not the file of its manifest" in text

    @pytest.mark.parametrize("part", ["toy", "toy-step"])
    @pytest.mark.parametrize("variant", ["fp16", "int8"])
    def test_a_claim_that_is_wrong(self, copied, toy_corpus, part, variant):
        def change(raw):
            raw["variants"][variant]["metrics"]["bleu"] += 0.2  # the margin is 0.1

        rewrite(copied / "nlp" / part / "1", change)
        good, text = judge(copied)
        assert not good
        assert "the manifest says" in text

    def test_a_claim_within_the_margin(self, copied, toy_corpus):
        def change(raw):
            raw["variants"]["fp16"]["metrics"]["bleu"] += 0.05

        for part in ("toy", "toy-step"):
            rewrite(copied / "nlp" / part / "1", change)
        good, text = judge(copied)
        assert good, text

    def test_another_card(self, copied, toy_corpus):
        path = copied / "nlp" / "toy" / "1" / CARD_NAME
        path.write_text(path.read_text(encoding="utf-8") + "It is the best of all.\n", encoding="utf-8")
        good, text = judge(copied)
        assert not good
        assert "is not the manifest's card" in text

    @pytest.mark.parametrize("missing", ["toy", "toy-step"])
    def test_a_half_without_the_other(self, copied, toy_corpus, missing):
        shutil.rmtree(copied / "nlp" / missing)
        good, text = judge(copied)
        assert not good
        assert "half published" in text

    def test_nothing_to_check(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(evaluate.EvaluateConfig(tmp_path))
        assert "no nlp models" in str(ended.value.code)


class TestShipped:
    @pytest.mark.parametrize(
        "part", [f"{name}{part}" for name in ("enja-transformer", "enja-gru") for part in ("", "-step")]
    )
    def test_files_are_those_of_the_manifests(self, part):
        folder = SHIPPED / "nlp" / part / "1"
        manifest = read_manifest(folder)
        for variant in manifest.variants.values():
            verify_variant(folder, variant)
        read_assets(folder, manifest)
        card = render_card(manifest)
        for path in (folder / CARD_NAME, ROOT / "services" / "nlp" / "cards" / f"{part}.md"):
            assert path.read_text(encoding="utf-8") == card

    def test_translators_are_as_good_as_they_must_be(self):
        transformer, gru = (
            read_manifest(SHIPPED / "nlp" / name / "1").variants["int8"].metrics["bleu_greedy"]
            for name in ("enja-transformer", "enja-gru")
        )
        assert transformer >= 33
        assert gru >= 14
        assert transformer - gru >= 8

    @pytest.mark.parametrize("name", ["enja-transformer", "enja-gru"])
    def test_int8_loses_at_most_half_a_point(self, name):
        manifest = read_manifest(SHIPPED / "nlp" / name / "1")
        assert manifest.training.baselines["fp16"] - manifest.variants["int8"].metrics["bleu"] <= 0.5
