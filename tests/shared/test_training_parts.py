"""The small parts of training: registry, randomness, measures, gate, latency, checkpoints, curves."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from shared.errors import ConfigurationError
from shared.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from shared.training.curves import draw_curves
from shared.training.gate import Measured, judge
from shared.training.latency import measure_latencies, smallest_near_best
from shared.training.memory import keep_freed_memory
from shared.training.metrics import Classification, agreement, classify, torch_predictor
from shared.training.registry import Registry
from shared.training.seed import epoch_order, sample_rng, seed_everything


def test_registry_refuses_a_name_twice_and_lists_what_it_knows():
    registry = Registry("net")
    registry.register("b")(2)
    registry.register("a")(1)

    assert list(registry) == ["a", "b"]
    assert registry.get("a") == 1
    assert "a" in registry
    with pytest.raises(ConfigurationError, match="net `a` is registered already"):
        registry.register("a")(3)
    with pytest.raises(ConfigurationError, match="net `c` is unknown; known: a, b"):
        registry.get("c")


def test_randomness_of_an_example_depends_on_its_three_numbers_only():
    draws = {
        (seed, epoch, index): sample_rng(seed, epoch, index).random()
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(set(draws.values())) == 27
    random.random()
    assert sample_rng(1, 2, 0).random() == draws[1, 2, 0]


def test_order_of_an_epoch_is_a_permutation_of_its_own():
    one, other = epoch_order(0, 0, 100), epoch_order(0, 1, 100)
    assert sorted(one) == list(range(100))
    assert (one != other).any()
    np.testing.assert_array_equal(one, epoch_order(0, 0, 100))


def test_seed_everything_repeats_all_three_generators():
    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((random.random(), np.random.random(), float(torch.rand(1))))
    assert draws[0] == draws[1]


LOGITS = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]], np.float32)
RESULT = Classification(LOGITS, np.array([0, 1, 1, 0]))


def test_measures_by_hand():
    assert RESULT.correct == 3  # a tie goes to the first class
    assert RESULT.accuracy == 0.75
    np.testing.assert_array_equal(RESULT.confusion(), [[2, 0], [1, 1]])
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3)), math.log(2)]
    assert RESULT.cross_entropy == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_cross_entropy_survives_large_logits():
    assert Classification(np.array([[1e4, 0.0]], np.float32), np.array([1])).cross_entropy == pytest.approx(1e4)


def test_agreement_counts_answers_and_not_labels():
    other = Classification(-LOGITS, RESULT.labels)
    assert agreement(RESULT, other) == 0.25  # the tie


@pytest.mark.parametrize("count", [1, 4, 9])
def test_classify_is_the_same_at_any_batch(count):
    images = np.random.default_rng(0).standard_normal((count, 3), np.float32)
    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    batches = []

    def predict(batch):
        batches.append(len(batch))
        return batch @ weights

    result = classify(predict, iter(images), np.zeros(count, np.int64), batch=4)

    np.testing.assert_allclose(result.logits, images @ weights, rtol=1e-5)
    assert max(batches) <= 4
    assert sum(batches) == count


def test_torch_predictor_uses_eval_mode_without_gradients():
    model = torch.nn.Dropout(0.9).train()
    ones = np.ones((2, 50), np.float32)
    np.testing.assert_array_equal(torch_predictor(model)(ones), ones)


FP32 = Measured(accuracy=0.95, agreement=1.0, bytes=1000, latency_p50_ms=10.0)


@pytest.mark.parametrize(
    ("variant", "ships", "reason"),
    [
        (Measured(0.95, 0.99, 300, 5.0), True, None),
        (Measured(0.94, 0.97, 300, 5.0), True, None),  # both exactly at their limits
        (Measured(0.935, 0.99, 300, 5.0), False, "loses 1.50 points"),
        (Measured(0.96, 0.96, 300, 5.0), False, "agrees with fp32 on 96.0%"),
        (Measured(0.95, 1.0, 1000, 10.0), False, "neither smaller nor faster"),
        (Measured(0.95, 1.0, 300, 20.0), True, None),  # slower, but smaller
        (Measured(0.95, 1.0, 2000, 5.0), True, None),  # larger, but faster
    ],
)
def test_gate(variant, ships, reason):
    verdict = judge(variant, FP32)
    assert verdict.ships is ships
    assert (reason is None) == (not verdict.reasons)
    assert reason is None or reason in verdict.reasons[0]


def test_gate_gives_every_reason():
    assert len(judge(Measured(0.5, 0.5, 2000, 20.0), FP32).reasons) == 3


@pytest.mark.parametrize(
    ("throughput", "batch"),
    [
        ({1: 100.0, 2: 150.0, 4: 180.0, 8: 181.0}, 4),
        ({1: 100.0, 2: 99.0, 4: 98.0}, 1),
        ({1: 97.0, 2: 100.0}, 1),
        ({1: 96.0, 2: 100.0}, 2),
    ],
)
def test_smallest_batch_near_the_best(throughput, batch):
    assert smallest_near_best(throughput) == batch


def test_latency_tells_slow_from_fast():
    clock = {"slow": 0.004, "fast": 0.001}

    def busy(seconds):
        import time

        def predict(batch):
            time.sleep(seconds * len(batch))
            return batch

        return predict

    found = measure_latencies(
        {name: busy(seconds) for name, seconds in clock.items()}, np.zeros((1, 2), np.float32), rounds=7, batch_rounds=1
    )
    for name, seconds in clock.items():
        assert 1e3 * seconds <= found[name].p50_ms < 1e3 * seconds + 3  # a sleep may be late, never early
        assert found[name].p50_ms <= found[name].p95_ms
        assert set(found[name].throughput) == {1, 2, 4, 8, 16, 32}
    assert found["slow"].p50_ms > found["fast"].p50_ms


def test_checkpoint_restores_every_generator(tmp_path):
    seed_everything(3)
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.standard_normal()
    path = tmp_path / "last.pt"
    save_checkpoint(path, parts={"x": {"w": torch.arange(3.0)}}, progress=Progress(epoch=2, step=5), fingerprint="f")
    expected = (random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(1)))
    seed_everything(99)

    parts, progress = load_checkpoint(path, fingerprint="f")

    assert (random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(1))) == expected
    assert torch.equal(parts["x"]["w"], torch.arange(3.0))
    assert (progress.epoch, progress.step) == (2, 5)


def test_curves_are_drawn(tmp_path):
    lines = [{"epoch": e, "train_loss": 1 / (e + 1), "val_accuracy": 0.5, "wall_seconds": e} for e in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    path = draw_curves(tmp_path, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_memory_advice_does_not_fail():
    assert keep_freed_memory() in (True, False)
