"""GPT-1's heads: what each reads and adds up, what learns, and what the examples are made of."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from services.nlp.tokenizers.characters import collect_characters
from services.nlp.tokenizers.special import PAD
from services.nlp.training import study_heads
from services.nlp.training.head_tasks import TASKS, make_examples, speeches
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.models.gpt_heads import (
    DELIMITER,
    EXTRACT,
    START,
    GptWithHead,
    Objective,
    padded_examples,
    row_of,
)

V, WIDTH = 30, 32


def network(outputs, *, frozen=False, seed=0):
    torch.manual_seed(seed)
    model = GptWithHead(Gpt(GptConfig(V, context=24, width=WIDTH, layers=2, heads=4)), outputs, frozen=frozen).eval()
    for weight in model.parameters():  # larger than at the start, so that every part counts
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rows(rng, count, least=3, most=8):
    """Random rows of different lengths."""
    return [row_of(rng.integers(4, V, rng.integers(least, most)).tolist()) for _ in range(count)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_row_is_framed_and_its_texts_kept_apart():
    assert row_of([7, 8]) == [START, 7, 8, EXTRACT]
    assert row_of([7, 8], [9]) == [START, 7, 8, DELIMITER, 9, EXTRACT]
    tokens = padded_examples([[[1, 5, 2]], [[1, 5, 6, 7, 2]]])
    assert tokens.tolist() == [[[1, 5, 2, PAD, PAD]], [[1, 5, 6, 7, 2]]]


@pytest.mark.parametrize(("outputs", "count", "shape"), [(3, 1, (4, 3)), (2, 2, (4, 2)), (1, 4, (4, 4))])
def test_shapes(rng, outputs, count, shape):
    tokens = padded_examples([rows(rng, count) for _ in range(4)])
    assert network(outputs)(tokens).shape == shape


@pytest.mark.parametrize(("outputs", "count"), [(3, 1), (2, 2), (1, 4)])
@torch.inference_mode()
def test_equals_the_formulae(rng, outputs, count):
    """Row by row, without padding: linear(LN(state at the last token)), summed over rows, or one score a row."""
    model = network(outputs)
    examples = [rows(rng, count) for _ in range(3)]
    found = model(padded_examples(examples))
    for example, logits in zip(examples, found, strict=True):
        last = torch.stack([model.gpt.norm(model.gpt.states(torch.tensor([row]))[0, -1]) for row in example])
        weight, bias = model.head.weight, model.head.bias
        expected = last @ weight[0] + bias if outputs == 1 else last.sum(0) @ weight.T + bias
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_stands_behind_the_extract_token_is_not_read(rng):
    model, tokens = network(3), padded_examples([rows(rng, 1, 3, 4), rows(rng, 1, 7, 8)])
    assert (tokens[0] == PAD).any()
    changed = torch.where(tokens == PAD, 9, tokens)
    torch.testing.assert_close(model(tokens), model(changed))
    before = tokens.clone()
    before[:, 0, 2] = tokens[:, 0, 2] % (V - 5) + 5
    assert (model(tokens) - model(before)).abs().min() > 1e-4, "and all before is"


@torch.inference_mode()
def test_similarity_does_not_depend_on_the_order_and_entailment_does(rng):
    one, other = (rng.integers(4, V, size).tolist() for size in (4, 6))
    model = network(2)
    similarity = [
        padded_examples([[row_of(*order) for order in orders]])
        for orders in ([(one, other), (other, one)], [(other, one), (one, other)])
    ]
    torch.testing.assert_close(model(similarity[0]), model(similarity[1]))
    entailment = [padded_examples([[row_of(*order)]]) for order in ((one, other), (other, one))]
    assert (model(entailment[0]) - model(entailment[1])).abs().max() > 1e-3


@torch.inference_mode()
def test_the_scores_of_multiple_choice_move_with_the_answers(rng):
    model, answers = network(1), rows(rng, 4)
    order = [2, 0, 3, 1]
    scores = model(padded_examples([answers]))[0]
    torch.testing.assert_close(model(padded_examples([[answers[index] for index in order]]))[0], scores[order])


def test_the_loss_is_that_of_the_task_and_half_that_of_the_language_model(rng):
    model = network(3)
    examples = [rows(rng, 1) for _ in range(4)]
    tokens, labels = padded_examples(examples), torch.tensor([0, 2, 1, 0])
    total, count = 0.0, 0
    with torch.inference_mode():
        task = F.cross_entropy(model(tokens), labels).item()
        for (row,) in examples:
            ids = torch.tensor(row)
            total += F.cross_entropy(model.gpt(ids[None])[0, :-1], ids[1:], reduction="sum").item()
            count += len(row) - 1
    assert model.loss(tokens, labels).item() == pytest.approx(task + 0.5 * total / count, rel=1e-4)
    assert Objective(model)((tokens, labels)).item() == pytest.approx(task + 0.5 * total / count, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_learns(rng, frozen):
    model = network(2, frozen=frozen)
    model.loss(padded_examples([rows(rng, 1) for _ in range(3)]), torch.tensor([0, 1, 0])).backward()
    moved = {
        name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()
    }
    assert moved == ({"head"} if frozen else {"head", "gpt"})
    everything = [weight.grad is not None and bool(weight.grad.any()) for weight in model.gpt.parameters()]
    assert frozen or all(everything), "every part of the network is fine-tuned"


DOINGS = ("sings", "dances", "waits", "eats")
PLAY = "\n\n".join(
    f"{name}:\n" + "\n".join(f"{word} goes the {name.lower()} and {other}{sign}" for other in DOINGS)
    for name in ("ROMEO", "JULIET", "NURSE", "TYBALT")
    for word, sign in (("Whither", "?"), ("There", "."), ("When", "?"), ("Here", "!"))
)


class TestExamples:
    @pytest.mark.parametrize("task", TASKS)
    def test_are_the_same_for_the_same_seed_and_balanced(self, task):
        made = make_examples(task, PLAY, 24, seed=1)
        assert made == make_examples(task, PLAY, 24, seed=1) != make_examples(task, PLAY, 24, seed=2)
        assert len(made) == 24
        share = np.mean([example.label == 0 for example in made])
        assert share == 0.5 if TASKS[task].head != "multiple choice" else 0 < share < 0.6

    def test_a_question_is_told_by_the_sign_that_was_taken_away(self):
        for example in make_examples("question", PLAY, 32, seed=0):
            ((sentence,),) = example.rows
            assert (sentence + "?" in PLAY.replace("\n", " ")) == bool(example.label)
            assert sentence[-1] not in ".?!"

    def test_pairs_follow_each_other_or_not(self):
        lines = speeches(PLAY)
        follow = {pair for speech in lines for pair in pairwise(speech)}
        for example in make_examples("next", PLAY, 32, seed=0):
            assert (example.rows[0] in follow) == bool(example.label)
        for example in make_examples("choice", PLAY, 32, seed=0):
            assert [row in follow for row in example.rows].index(True) == example.label
            assert len({row[0] for row in example.rows}) == 1

    def test_similarity_shows_both_orders_of_one_speech_or_two(self):
        lines = [set(speech) for speech in speeches(PLAY)]
        for example in make_examples("same", PLAY, 32, seed=0):
            one, other = example.rows
            assert one == other[::-1]
            assert any(set(one) <= speech for speech in lines) == bool(example.label)


def test_the_study_compares_three_ways(tmp_path, monkeypatch):
    tokenizer = collect_characters(PLAY)
    gpt = Gpt(GptConfig(len(tokenizer), context=112, width=16, layers=1, heads=2))
    pretrained = tmp_path / "shakespeare-gpt" / "seed0"
    pretrained.mkdir(parents=True)
    torch.save(gpt.state_dict(), pretrained / "weights.pt")
    (pretrained / "vocabulary.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (pretrained / "result.json").write_text(json.dumps({"network": vars(gpt.config)}))
    for part in ("training_text", "held_back_text"):
        monkeypatch.setattr(study_heads, part, lambda name: PLAY)
    config = study_heads.StudyHeadsConfig(
        labels=16, chosen=4, tested=8, epochs=1, batch=8, seeds=2, runs=tmp_path, picture=tmp_path / "heads.svg"
    )
    study_heads.main(config)
    table = (config.folder / "table.md").read_text()
    assert table.count("\n") == 2 + len(TASKS)
    assert " to " in table.splitlines()[2], "the classification has seeds"
    found = [json.loads(path.read_text()) for path in sorted(config.folder.glob("*/result.json"))]
    assert len(found) == 3 * (2 + 3)
    assert all(0 <= one["accuracy"] <= 1 and one["examples"] == 8 for one in found)
    assert "</svg>" in config.picture.read_text()
    monkeypatch.setattr(study_heads, "Fit", None)
    study_heads.main(dataclasses.replace(config, tasks=("same",)))
    assert [row.split()[1] for row in (config.folder / "table.md").read_text().splitlines()[2:]] == ["same"]
    study_heads.main(config)
    assert (config.folder / "table.md").read_text() == table, "what is finished is not made again"
