"""Made-up tasks: what their rows say, what is held back, how they are measured; and the program that learns them."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro

from services.nlp.serving.habits import ModelHabits
from services.nlp.tokenizers.special import PAD
from services.nlp.training import evaluate, export_task, train_task
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.tasks import TASKS, Addition, Permutations
from shared.artifacts import read_manifest
from shared.errors import ConfigurationError


@pytest.fixture(scope="module")
def addition():
    return Addition()


@pytest.fixture(scope="module")
def permutations():
    return Permutations()


def line(task, tokens):
    return task.tokenizer.decode(tokens.tolist())


class TestAddition:
    def test_a_row_asks_for_the_sum_from_its_end(self, addition):
        rows = addition.rows([(12, 34), (7, 5), (99, 99)])
        assert [line(addition, row) for row in rows.tokens] == ["12+34=64\n", "7+5=21\n", "99+99=891"]
        assert [line(addition, row) for row in rows.targets] == ["64\n", "21\n", "891\n"]
        for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
            where = np.flatnonzero(targets)
            assert line(addition, tokens[: where[0] + 1]).endswith("=")
            np.testing.assert_array_equal(tokens[where[:-1] + 1], targets[where[:-1]], "a target is the next token")

    def test_held_back_sums_are_in_no_order_those_that_train(self, addition):
        held, training = set(addition.held), set(addition.training)
        assert held | training == set(itertools.product(range(100), repeat=2))
        assert not {tuple(sorted(pair)) for pair in held} & {tuple(sorted(pair)) for pair in training}
        assert len(held) == pytest.approx(2000, abs=20)

    def test_one_wrong_digit_makes_a_sum_wrong(self, addition):
        rows = addition.held_back()

        def predict(tokens):
            found = rows.targets[: len(tokens)].copy()
            found[0, np.flatnonzero(found[0])[-1]] = addition.tokenizer.encode("+")[0]
            return np.where(found == PAD, 9, found)  # what is not asked does not count

        small = addition.evaluate(predict, batch=len(rows.tokens))
        assert small["exact_match"] == pytest.approx(1 - 1 / len(rows.tokens))
        assert 0.999 < small["digits"] < 1

    def test_the_baseline_is_the_most_frequent_sum(self, addition):
        sums = np.bincount([one + other for one, other in addition.training])
        share = np.mean([one + other == sums.argmax() for one, other in addition.held])
        assert addition.baselines() == {"most_frequent_sum": pytest.approx(share)}


class TestPermutations:
    def test_a_row_shows_a_function_by_its_pairs(self, permutations):
        functions = np.array([[3, 4, 5, 0, 1, 2]])
        rows = permutations.rows(functions, np.arange(permutations.pairs)[None] % 6)
        assert line(permutations, rows.tokens[0]) == "a4b5c6d1e2f3" * 2 + "a"
        assert line(permutations, rows.targets[0]) == "456123" * 2 + "4"
        assert np.flatnonzero(rows.targets[0]).tolist() == list(range(0, 26, 2)), "asked where an argument stands"
        for prompt in ("a", "a4b1c2a", line(permutations, rows.tokens[0])):
            ModelHabits.of(SimpleNamespace(preprocessing=Permutations.serving)).check(prompt, "fewshot-gpt")

    def test_held_back_functions_never_train(self, permutations):
        held, training = ({tuple(row) for row in part.tolist()} for part in (permutations.held, permutations.training))
        assert len(held) == 144
        assert len(held | training) == 720
        assert not held & training

    @pytest.mark.parametrize("shots", [0, 1, 2, 5, 12])
    def test_best_possible_by_simulation(self, permutations, shots):
        rng, right, trials = np.random.default_rng(shots), 0, 20_000
        for _ in range(trials):
            drawn = rng.integers(0, 6, shots + 1)
            seen = set(drawn[:-1].tolist())
            right += int(drawn[-1]) in seen or rng.random() < 1 / (6 - len(seen))
        assert permutations.best_possible(shots) == pytest.approx(right / trials, abs=0.015)  # four deviations

    def test_accuracy_is_by_the_number_of_examples_before(self, permutations):
        targets = permutations.held_back().targets
        found = np.where(np.arange(targets.shape[1]) >= 2 * 2, targets, 0)  # knows nothing before two shots
        measures = permutations.evaluate(lambda tokens: found[: len(tokens)], batch=len(found))
        accuracies = [measures[f"accuracy_{shots}_shots"] for shots in permutations.shots]
        assert accuracies == [0, 0, 1, 1, 1, 1]
        assert measures["five_shot_accuracy"] == 1


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_counts_the_answers_alone(name):
    """The gradient of a logit is zero exactly where nothing is asked."""
    task = TASKS[name]()
    tokens, targets = train_task.TaskBatches(task, 5, 0, 1).batch(0, 0)
    model = Gpt(GptConfig(len(task.tokenizer), task.context, 16, 1, 2))
    logits = model(tokens)
    logits.retain_grad()
    train_task.token_cross_entropy()(logits, targets).backward()
    asked = logits.grad.abs().sum(-1) > 0
    assert torch.equal(asked, targets != PAD)


def publish_and_check(folder, monkeypatch, result):
    """What has not learnt its task does not ship; what ships is what was measured, graph for network."""
    place = ["--runs", str(folder), "--root", str(folder / "models")]
    config = tyro.cli(export_task.ExportTaskConfig, args=place)
    with pytest.raises(ConfigurationError, match="train longer"):
        export_task.export(config)
    monkeypatch.setattr(Addition, "least", 0)
    published = export_task.export(config)
    manifest = read_manifest(published)
    assert manifest.variants["fp16"].metrics["digits"] == pytest.approx(result["measures"]["digits"], abs=0.01)
    assert manifest.training.command == f"{result['command']} && {config.command}"
    assert ModelHabits.of(manifest) == ModelHabits(**Addition.serving)
    assert not any(check.problem for check in evaluate.check_version(published))


@pytest.mark.parametrize("name", TASKS)
def test_the_program_learns_and_says_how_well(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_task, "STEPS_PER_EPOCH", 12)
    monkeypatch.setattr(train_task, "VALIDATION_ROWS", 64)
    monkeypatch.setattr(Permutations, "rows_each", 2)
    arguments = f"--task {name} --epochs 2 --batch 16 --width 32 --layers 1 --runs {tmp_path}"
    config = tyro.cli(train_task.TrainTaskConfig, args=arguments.split())
    train_task.main(config)
    result = json.loads((config.folder / "result.json").read_text())
    assert result["command"] == config.command
    again = tyro.cli(train_task.TrainTaskConfig, args=[*config.command.split()[3:], "--runs", str(tmp_path)])
    assert again == config
    assert result["network"]["width"] == 32
    model = Gpt(GptConfig(**result["network"])).eval()
    model.load_state_dict(torch.load(config.folder / "weights.pt", weights_only=True))
    task = TASKS[name]()
    assert task.evaluate(train_task.predictor(model)) == result["measures"]
    assert task.measure in result["measures"]
    if name == "addition":
        publish_and_check(tmp_path, monkeypatch, result)
    losses = [json.loads(text)["val_loss"] for text in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
