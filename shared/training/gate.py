"""Which variants may ship: one earns its place by being smaller or faster, within its budget of accuracy."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LOSS = 0.01
"""Net loss of accuracy against fp32, as a share."""
MIN_AGREEMENT = 0.97
"""Share of the test part with the same answer as fp32."""


@dataclass(frozen=True)
class Measured:
    """What the gate looks at."""

    accuracy: float
    agreement: float
    bytes: int
    latency_p50_ms: float


@dataclass(frozen=True)
class Verdict:
    """Whether a variant ships, and each reason why not."""

    ships: bool
    reasons: tuple[str, ...]


def judge(variant: Measured, reference: Measured) -> Verdict:
    """Compares a variant with the fp32 model."""
    reasons = []
    loss = reference.accuracy - variant.accuracy
    if loss > MAX_LOSS + 1e-9:
        reasons.append(f"loses {100 * loss:.2f} points of accuracy, at most {100 * MAX_LOSS:.0f} allowed")
    if variant.agreement < MIN_AGREEMENT:
        reasons.append(f"agrees with fp32 on {variant.agreement:.1%}, at least {MIN_AGREEMENT:.0%} needed")
    if variant.bytes >= reference.bytes and variant.latency_p50_ms >= reference.latency_p50_ms:
        reasons.append("is neither smaller nor faster than fp32")
    return Verdict(not reasons, tuple(reasons))
