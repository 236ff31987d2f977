"""The fit loop: schedule, selection, log, and continuing a killed run bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shared.errors import ConfigurationError
from shared.training.ema import WeightAverage
from shared.training.loop import Fit, FitConfig, Score, learning_rate_at, parameter_groups, read_log

PROGRAM = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from torch.nn import functional as F
    from shared.training.loop import Fit, FitConfig, Score
    from shared.training.seed import sample_rng, seed_everything

    torch.set_num_threads(1)
    folder, delay = Path(sys.argv[1]), float(sys.argv[2])
    seed_everything(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    class Source:
        steps_per_epoch = 7

        def batch(self, epoch, step):
            (folder / "at").write_text(f"{epoch} {step}")
            time.sleep(delay)
            rng = sample_rng(0, epoch, step)
            inputs = torch.from_numpy(rng.standard_normal((16, 8), dtype="float32"))
            return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()

    def validate(model):
        weight = float(model[0].weight.sum())
        return Score(-abs(weight), {"weight": weight})

    folder.mkdir(parents=True, exist_ok=True)
    config = FitConfig(epochs=4, learning_rate=0.01, checkpoint_every=2, ema_decay=0.9)
    Fit(model, Source(), F.cross_entropy, validate, config, folder).run()
    """
)


def start(folder: Path, delay: float) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(delay)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def digest(path: Path) -> str:
    """Of every tensor's bytes, by name."""
    hashed = hashlib.sha256()
    for name, tensor in torch.load(path, weights_only=True).items():
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


def final_state(folder: Path) -> list:
    parts = torch.load(folder / "last.pt", weights_only=True)["parts"]
    model = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in parts["model"].values())).hexdigest()
    log = [{k: v for k, v in line.items() if k != "wall_seconds"} for line in read_log(folder)]
    return [model, digest(folder / "best.pt"), log]


def test_run_killed_twice_continues_bit_by_bit(tmp_path):
    whole = start(tmp_path / "whole", 0.0)
    killed = tmp_path / "killed"
    reached = set()
    generator = random.Random()  # a new place each time the tests run: any of them must work
    for _ in range(2):
        process = start(killed, 0.03)
        target = f"{generator.randrange(3)} {generator.randrange(7)}"
        deadline = time.monotonic() + 40
        while process.poll() is None and time.monotonic() < deadline:
            at = (killed / "at").read_text() if (killed / "at").exists() else ""
            if at >= target and len(at) == 3:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached.add((killed / "at").read_text())
        (killed / "at").unlink()
    finish(start(killed, 0.0))
    finish(whole)

    assert final_state(killed) == final_state(tmp_path / "whole"), f"killed at {reached}"


class Numbers:
    """Regression of y = 2x on fixed numbers."""

    steps_per_epoch = 3

    def batch(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([[1.0 + step], [-1.0 - step]])
        return x, 2 * x


def linear() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def fit(folder: Path, *, validate=None, **config) -> tuple[nn.Linear, Fit]:
    model = linear()
    settings = {"epochs": 5, "learning_rate": 0.3, "weight_decay": 0.0, "ema_decay": 0.0, "warmup_share": 0.0}
    run = Fit(
        model,
        Numbers(),
        F.mse_loss,
        validate or (lambda m: Score(-abs(float(m.weight.detach()) - 2), {"weight": float(m.weight.detach())})),
        FitConfig(**(settings | config)),
        folder,
    )
    return model, run


def test_learns_and_logs_every_epoch(tmp_path):
    model, run = fit(tmp_path, epochs=15)

    result = run.run()

    assert float(model.weight.detach()) == pytest.approx(2, abs=0.1)
    log = read_log(tmp_path)
    assert [line["epoch"] for line in log] == list(range(15))
    assert log[-1]["train_loss"] < log[0]["train_loss"] / 10
    assert result.best_score == max(-abs(line["weight"] - 2) for line in log)


def test_keeps_the_weights_of_the_best_epoch_and_not_of_the_last(tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    seen = []

    def validate(model):
        seen.append(float(model.weight.detach()))
        return Score(next(scores), {"x": 0.0})

    model, run = fit(tmp_path, epochs=3, validate=validate)

    assert run.run().best_epoch == 1
    assert float(model.weight.detach()) == seen[1]


def test_finished_run_is_not_trained_again(tmp_path):
    first, run = fit(tmp_path)
    run.run()
    log = (tmp_path / "metrics.jsonl").read_bytes()

    second, again = fit(tmp_path)
    again.source.batch = lambda *_: pytest.fail("it trained again")
    again.run()

    assert torch.equal(first.weight, second.weight)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_another_configuration_is_refused(tmp_path):
    fit(tmp_path)[1].run()
    with pytest.raises(ConfigurationError, match="another configuration"):
        fit(tmp_path, learning_rate=0.1)[1].run()


def test_diverging_run_says_so(tmp_path):
    _, run = fit(tmp_path)
    run.loss = lambda outputs, targets: (outputs * float("nan")).sum()
    with pytest.raises(ConfigurationError, match="lower the learning rate"):
        run.run()


def test_no_full_batch_is_refused(tmp_path):
    class Nothing(Numbers):
        steps_per_epoch = 0

    with pytest.raises(ConfigurationError, match="no full batch"):
        Fit(linear(), Nothing(), F.mse_loss, lambda m: Score(0, {}), FitConfig(), tmp_path)


def test_learning_rate_rises_and_then_falls_along_a_cosine():
    config = FitConfig(learning_rate=1.0, warmup_share=0.2)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_inverse_square_root_schedule():
    config = FitConfig(learning_rate=1.0, warmup_share=0.25, schedule="inverse-sqrt")
    rates = [learning_rate_at(step, 400, config) for step in range(400)]
    assert rates[49] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1.0)
    assert rates[399] == pytest.approx(0.5)  # four times as far, half as fast
    longer = FitConfig(learning_rate=1.0, warmup_share=0.125, schedule="inverse-sqrt")
    assert rates == [learning_rate_at(step, 800, longer) for step in range(400)]  # the end is not looked at


def test_constant_schedule():
    config = FitConfig(learning_rate=0.5, warmup_share=0.1, schedule="constant")
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert set(rates[10:]) == {0.5}
    flat = FitConfig(learning_rate=0.5, warmup_share=0.0, schedule="constant")
    assert {learning_rate_at(step, 100, flat) for step in range(100)} == {0.5}


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_which_epoch_is_kept(keep, epoch, tmp_path):
    class Source:
        steps_per_epoch = 1

        def batch(self, epoch, step):
            return torch.ones(2, 3), torch.ones(2, 2)

    seen, scores = [], iter([1.0, 3.0, 2.0, 0.5])

    def validate(model):
        seen.append(model.weight.detach().clone())
        return Score(next(scores), {})

    model = nn.Linear(3, 2)
    config = FitConfig(epochs=4, ema_decay=0.0, warmup_share=0.0)
    result = Fit(model, Source(), F.mse_loss, validate, config, tmp_path, keep=keep).run()
    assert (result.best_epoch, result.best_score) == (epoch, [1.0, 3.0, 2.0, 0.5][epoch])
    assert torch.equal(model.weight, seen[epoch])


@pytest.mark.parametrize("fused", [False, True])
def test_inputs_may_be_a_tuple_and_the_optimiser_is_as_configured(fused, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, pair):
            return self.layer(pair[0] + pair[1])

    class Source:
        steps_per_epoch = 30

        def batch(self, epoch, step):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            left, right = torch.randn(2, 16, 3, generator=generator)
            return (left, right), (left + right).sum(1, keepdim=True)

    torch.manual_seed(0)
    config = FitConfig(epochs=4, learning_rate=0.1, weight_decay=0.0, ema_decay=0.0, beta2=0.98, fused=fused)
    model = Sum()
    fit = Fit(model, Source(), F.mse_loss, lambda m: Score(-abs(m.layer.bias.item()), {}), config, tmp_path)
    fit.run()

    assert {group["betas"] for group in fit.optimiser.param_groups} == {(0.9, 0.98)}
    assert read_log(tmp_path)[-1]["train_loss"] < 0.01 * read_log(tmp_path)[0]["train_loss"]
    assert torch.allclose(model.layer.weight, torch.ones(1, 3), atol=0.05)


def test_biases_and_normalisation_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.5)
    assert [p.shape for p in decayed["params"]] == [(2, 4)]
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)


def test_weight_average_by_hand():
    model = linear()
    average = WeightAverage(model, 0.5)
    nn.init.constant_(model.weight, 1.0)
    average.update(model)  # decay min(0.5, 1/10): 0.1 * 0 + 0.9 * 1
    assert float(average.model.weight) == pytest.approx(0.9)
    average.update(model)  # decay 2/11
    assert float(average.model.weight) == pytest.approx(0.9 * 2 / 11 + 9 / 11)


def test_log_is_json_lines(tmp_path):
    fit(tmp_path, epochs=2)[1].run()
    assert [set(json.loads(line)) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"epoch", "train_loss", "weight", "wall_seconds"}
    ] * 2
