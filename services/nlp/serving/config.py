"""What the environment sets for the nlp service."""

from __future__ import annotations

from dataclasses import dataclass

from shared.serving.config import ServingConfig


@dataclass(frozen=True, kw_only=True)
class NlpConfig(ServingConfig):
    """Configuration of the nlp service.

    Attributes:
        default_translator: the model that Translate means when the request names none.
        default_generator: the model that GenerateText and ScoreText mean when the request names none.
        default_masked_model: the model that FillMask and NextSentence mean when the request names none.
        default_encoder: the model that EmbedText means when the request names none.
        default_text_classifier: the model that ClassifyText means when the request names none.
        max_text_characters: longest text of a request.
    """

    default_translator: str = "enja-transformer"
    default_generator: str = "shakespeare-gpt"
    default_masked_model: str = "english-bert"
    default_encoder: str = "english-bert"
    default_text_classifier: str = "english-bert"
    max_text_characters: int = 2000
