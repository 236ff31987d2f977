"""The report's Transformer: its mistakes are those that are said, and nothing else is wrong with it."""

import math

import pytest
import torch
from torch import nn

from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.training.data import padded
from services.nlp.training.models.as_reported import ReportAttention, ReportTransformer
from services.nlp.training.models.transformer import TransformerConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ReportTransformer(
        TransformerConfig(40, 50, width=16, feed_forward=24, layers=2, heads=3, dropout=0.1)
    ).eval()


def test_the_number_of_weights_is_the_reports():
    made = ReportTransformer(TransformerConfig(3725, 4405, width=128, feed_forward=256, layers=3, heads=6, dropout=0.1))
    assert sum(parameter.numel() for parameter in made.parameters()) == 3_210_624


def test_attention_is_torchs_but_for_the_divisor():
    torch.manual_seed(0)
    own = ReportAttention(32, 6, 0.0)
    queries, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    keys, values = own.project(memory)
    split = own.query(queries).view(2, 5, 6, 64).transpose(1, 2)
    expected = nn.functional.scaled_dot_product_attention(split, keys, values, scale=1 / math.sqrt(32))
    answer, _ = own.attend(queries, keys, values, None)
    torch.testing.assert_close(answer, own.output(expected.transpose(1, 2).flatten(2)), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_step_by_step_is_at_once_unless_positions_are_shifted(model):
    source, target = padded([[5, 6, 7, 8, EOS], [9, EOS]]), torch.randint(4, 50, (2, 7))
    at_once, state, shifted = model((source, target)), model.start(source), model.start(source, 0)
    for position in range(7):
        logits, state = model.proceed(target[:, position], state)
        torch.testing.assert_close(logits, at_once[:, position], rtol=0, atol=1e-4)
        wrong, shifted = model.proceed(target[:, position], shifted)
        assert (wrong - logits).abs().max() > 1e-2


def test_position_0_is_nothing_and_embeddings_are_neither_scaled_nor_small(model):
    tokens = torch.tensor([[7, 9]])
    torch.testing.assert_close(model.target(tokens, torch.tensor([0, 0]))[0], model.target.table.weight[[7, 9]])
    assert model.target.table.weight.std().item() == pytest.approx(1, abs=0.1)
    logits = model((torch.tensor([[5, 6, EOS]]), torch.tensor([[BOS, 5, 6]])))
    assert logits.std().item() > 2.5  # sqrt(16) in the mean; those of the corrected network begin at 1


@torch.inference_mode()
def test_padding_and_later_words_change_nothing(model):
    source, target = torch.tensor([[5, 6, 7, EOS]]), torch.randint(4, 50, (1, 5))
    before = model((source, target))
    more = nn.functional.pad(source, (0, 3), value=PAD)
    torch.testing.assert_close(model((more, target)), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(model((source, target[:, :3])), before[:, :3], rtol=0, atol=1e-4)
