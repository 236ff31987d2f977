"""The measures by which models are judged, one entry for each that a manifest may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import ConfigurationError


@dataclass(frozen=True)
class Measure:
    """A measure: how it is written, in which direction it is better, and how much of it is noise.

    `margin` is what a second evaluation of the same file may differ by; 0 means one example of the test part.
    """

    name: str
    digits: int
    higher_is_better: bool = True
    margin: float = 0.0

    def text(self, value: float) -> str:
        """The value with the digits that mean something."""
        return f"{value:.{self.digits}f}"

    def loss(self, reference: float, value: float) -> float:
        """By how much `value` is worse than `reference`; negative if it is better."""
        return reference - value if self.higher_is_better else value - reference


MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("accuracy", digits=4),
        Measure("exact_match", digits=4, margin=0.002),
        Measure("five_shot_accuracy", digits=4, margin=0.005),
        Measure("bleu", digits=2, margin=0.1),
        Measure("cosine", digits=4, margin=0.001),
        Measure("nats", digits=3, higher_is_better=False, margin=0.005),
    )
}


def measure_named(name: str) -> Measure:
    """The measure of a manifest.

    Raises:
        ConfigurationError: no such measure.
    """
    if name not in MEASURES:
        raise ConfigurationError(f"measure `{name}` is unknown; known: {', '.join(MEASURES)}")
    return MEASURES[name]
