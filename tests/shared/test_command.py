"""A run's command line is read back as the same configuration."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from shared.training.command import command_line


@dataclass(frozen=True)
class Config:
    text: str = "a"
    seed: int = 0
    learning_rate: float = 1e-3
    last_epoch: int | None = None
    waves: bool = False
    norm: bool = True
    runs: Path = Path("runs")
    quick: bool = False


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Config(), "--text a --seed 0"),
        (Config(seed=3, learning_rate=0.01, last_epoch=2), "--text a --seed 3 --learning-rate 0.01 --last-epoch 2"),
        (Config(waves=True, norm=False), "--text a --seed 0 --waves --no-norm"),
        (Config(text="b", quick=True), "--text b --seed 0 --quick"),
    ],
)
def test_what_is_written_is_read_back(config, options):
    made = command_line("some.module", config, ("text", "seed"))
    assert made == f"python -m some.module {options}"
    assert tyro.cli(Config, args=made.split()[3:]) == config


def test_where_things_lie_is_left_out():
    assert command_line("m", Config(runs=Path("/elsewhere"))) == "python -m m"
