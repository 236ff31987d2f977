"""How a language model wants to be asked, which its manifest says."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from shared.artifacts import Manifest
from shared.errors import InvalidInput

DEFAULT_TEMPERATURE, DEFAULT_TOKENS = 0.8, 200


@dataclass(frozen=True)
class ModelHabits:
    """How a model wants to be asked, as its manifest says under `preprocessing`.

    Attributes:
        stop: ends an answer; empty if nothing does.
        length: tokens of an answer, for requests that name no limit.
        temperature: for requests that name none.
        reversed: it writes an answer from its end, so that nothing can be shown before all is there.
        pattern: what a prompt must be, as a regular expression; empty if it may be anything.
        example: a prompt of that pattern.
    """

    stop: str = ""
    length: int = DEFAULT_TOKENS
    temperature: float = DEFAULT_TEMPERATURE
    reversed: bool = False
    pattern: str = ""
    example: str = ""

    @classmethod
    def of(cls, manifest: Manifest) -> ModelHabits:
        """Those of a model."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in manifest.preprocessing.items() if name in names})

    def check(self, prompt: str, model: str) -> None:
        """Raises InvalidInput if a prompt is none for this model."""
        if self.pattern and not re.fullmatch(self.pattern, prompt):
            raise InvalidInput(
                "prompt",
                f"is none that {model} can answer, expected one like {self.example!r}",
                reason="PROMPT_NOT_UNDERSTOOD",
            )
