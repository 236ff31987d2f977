"""BERT before it serves: what is masked, what follows what, what the network may see, and that it learns."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from services.nlp.tokenizers.wordpiece import CLS, MASK, PAD, SEP, UNK, WordPieceTokenizer, train_wordpiece
from services.nlp.training import train_bert
from services.nlp.training.bert_batches import UNASKED, Masked, MaskedBatches, Masker, encode_reading, rows_of
from services.nlp.training.bert_data import Reading, paragraphs, speeches
from services.nlp.training.masking import SpecialIds, mask_tokens
from services.nlp.training.models.bert import Bert, BertConfig, mean_pool
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.train_bert import HeldBack, Pretraining, TrainBertConfig, baselines, measure

V = 50
IDS = SpecialIds(mask=4, never=frozenset({0, 1, 2, 3, 4}), size=3000)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    model = Bert(BertConfig(V, context=24, width=32, layers=3, heads=4)).eval()
    for weight in model.parameters():  # larger than at the start, so that every part counts
        nn.init.normal_(weight, std=0.2)
    return model


def reading():
    """Speeches that count: each line holds two neighbours, so that what follows can be known."""
    numbers = [f"n{index}" for index in range(12)]
    documents = [
        [[numbers[(begin + step) % 12], numbers[(begin + step + 1) % 12]] for step in range(5)] for begin in range(12)
    ]
    return Reading([["a", "b", word, "."] for word in numbers for _ in range(6)], documents)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(reading().words(), 40)


@pytest.fixture(scope="module")
def masked():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 3000, (12_000, 14))
    lengths = rng.integers(4, 13, len(tokens))
    tokens[:, 0] = 2
    tokens[np.arange(14) > lengths[:, None]] = 0
    tokens[np.arange(len(tokens)), lengths] = 3
    return tokens, mask_tokens(tokens, IDS, rng)


class TestMasking:
    def test_chooses_15_percent_and_hides_them_80_10_10(self, masked):
        tokens, rows = masked
        allowed = tokens > 4
        assert allowed.sum() > 80_000
        assert rows.chosen.sum() / allowed.sum() == pytest.approx(0.15, abs=0.003)
        there, original = rows.tokens[rows.chosen], tokens[rows.chosen]
        assert (there == 4).mean() == pytest.approx(0.8, abs=0.01)
        assert (there == original).mean() == pytest.approx(0.1, abs=0.01)
        assert ((there != 4) & (there != original)).mean() == pytest.approx(0.1, abs=0.01)

    def test_never_touches_special_pieces_nor_puts_them_in(self, masked):
        tokens, rows = masked
        special = tokens <= 4
        assert not rows.chosen[special].any()
        assert (rows.tokens[special] == tokens[special]).all()
        assert set(np.unique(rows.tokens[~special])) & set(range(5)) == {4}

    def test_what_was_not_chosen_stays(self, masked):
        tokens, rows = masked
        assert (rows.tokens[~rows.chosen] == tokens[~rows.chosen]).all()

    def test_short_rows_are_masked_as_often_as_long_ones(self, masked):
        tokens, rows = masked
        length = (tokens > 4).sum(1)
        for size in (4, 7, 11):
            share = rows.chosen[length == size].sum() / (size * (length == size).sum())
            assert share == pytest.approx(0.15, abs=0.02), size

    def test_the_loss_is_zero_away_from_the_gaps(self, bert):
        """Other answers where nothing was chosen change neither the loss nor its gradient."""
        torch.manual_seed(0)
        tokens, targets = torch.randint(5, V, (3, 9)), torch.full((3, 9), UNASKED)
        targets[0, 2], targets[2, 5] = 7, 8
        model, gradients = Pretraining(bert), []
        for visible in (tokens, tokens.clone()):
            model.zero_grad()
            part = Masked(visible, torch.zeros_like(tokens), targets, torch.full((3,), UNASKED))
            losses = model([part])
            losses.sum().backward()
            gradients.append((losses.detach(), bert.bias.grad.clone()))
            chosen = targets != UNASKED
            expected = nn.functional.cross_entropy(bert.fill(bert(visible, part.segments))[chosen], targets[chosen])
            assert losses[0].item() == pytest.approx(expected.item(), abs=1e-5)
        assert losses[1].item() == 0
        assert torch.equal(gradients[0][1], gradients[1][1])


class TestPairs:
    def test_rows_have_their_special_pieces_and_segments(self, tokenizer):
        c, s, p = tokenizer.cls, tokenizer.sep, tokenizer.pad
        tokens, segments = rows_of([([9, 8], [7]), ([6], [])], tokenizer, 24)
        assert tokens.tolist() == [[c, 9, 8, s, 7, s], [c, 6, s, p, p, p]]
        assert segments.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]

    def test_the_longer_text_is_cut(self, tokenizer):
        tokens, segments = rows_of([(list(range(10, 30)), [7, 8])], tokenizer, 12)
        assert tokens.shape == (1, 12)
        assert segments[0].sum() == 3, "the second text is whole"

    def test_half_follow_and_the_others_come_from_another_document(self, tokenizer):
        encoded = encode_reading(reading(), tokenizer)
        masker = Masker(tokenizer, 24)
        part = masker.pairs(encoded, encoded.borders * 20, np.random.default_rng(0))
        assert part.follows.float().mean().item() == pytest.approx(0.5, abs=0.06)
        tokens = torch.where(part.targets == UNASKED, part.tokens, part.targets)
        for row, (place, follows) in enumerate(zip(encoded.borders * 20, part.follows.tolist(), strict=True)):
            document, sentence = place
            behind = tokens[row][(part.segments[row] == 1) & (tokens[row] != tokenizer.sep)].tolist()
            lines = encoded.documents[document][sentence : sentence + 2]
            if follows:
                assert behind == [piece for line in lines for piece in line]
            else:
                others = [d for index, d in enumerate(encoded.documents) if index != document]
                assert any(
                    behind == [piece for line in d[s : s + 2] for piece in line] for d in others for s in range(1, 5)
                )

    def test_a_batch_is_the_same_for_the_same_step(self, tokenizer):
        encoded, masker = encode_reading(reading(), tokenizer), Masker(tokenizer, 24)
        one, other = (MaskedBatches(encoded, masker, 8, 4, seed=3, steps=5) for _ in range(2))
        for left, right in zip(one.batch(1, 2)[0], other.batch(1, 2)[0], strict=True):
            assert torch.equal(left.tokens, right.tokens)
            assert torch.equal(left.targets, right.targets)
        assert not torch.equal(one.batch(1, 2)[0][0].tokens, one.batch(1, 3)[0][0].tokens)

    def test_speeches_and_paragraphs(self):
        play = "First:\nSpeak, speak.\nWe know't.\n\nAll:\nAye.\n\nSecond:\nOne\ntwo"
        assert speeches(play)[0] == [["speak", ",", "speak", "."], ["we", "know", "'t", "."]]
        assert len(speeches(play)) == 2, "a speech of one line has nothing that follows"
        novel = "一 \r \r 吾輩 は 猫 で ある 。 名前 は まだ 無い 。 \r 「 はい 。 」 と 云う 。 \r 一文 。"
        assert paragraphs(novel) == [
            [["吾輩", "は", "猫", "で", "ある", "。"], ["名前", "は", "まだ", "無い", "。"]],
            [["「", "はい", "。", "」"], ["と", "云う", "。"]],
        ]

    @pytest.mark.data
    def test_nothing_held_back_trains(self):
        from services.nlp.training.bert_data import HELD_BACK, load_reading
        from services.nlp.training.data import load_pairs

        train, held = load_reading("english")
        seen = {tuple(sentence) for sentence in train.singles}
        assert len(held.singles) == HELD_BACK
        assert not seen & {tuple(sentence) for sentence in held.singles}
        only_dev = {tuple(s) for s in load_pairs("dev").english} - {tuple(s) for s in load_pairs("train").english}
        assert not seen & only_dev


class TestModel:
    def test_equals_torch_s_encoder(self, bert):
        """nn.TransformerEncoder with our weights, pre-LN and GELU."""
        config = bert.config
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )
        for ours, theirs in zip(bert.blocks, encoder.layers, strict=True):
            attention = ours.attention
            weights = {
                "self_attn.in_proj_weight": torch.cat((attention.query.weight, attention.keys_values.weight)),
                "self_attn.in_proj_bias": torch.cat((attention.query.bias, attention.keys_values.bias)),
                **{f"self_attn.out_proj.{kind}": value for kind, value in attention.output.named_parameters()},
            }
            for name, part in (
                ("linear1", ours.feed_forward[0]),
                ("linear2", ours.feed_forward[2]),
                ("norm1", ours.norms[0]),
                ("norm2", ours.norms[1]),
            ):
                weights |= {f"{name}.{kind}": value for kind, value in part.named_parameters()}
            theirs.load_state_dict(weights)
        encoder.norm.load_state_dict(bert.norm.state_dict())
        tokens, segments = torch.randint(1, V, (3, 20)), torch.randint(2, (3, 20))
        tokens[1, 15:] = tokens[2, 9:] = config.pad
        present = tokens != config.pad
        with torch.inference_mode():
            x = bert.tokens(tokens) + bert.positions(torch.arange(20)) + bert.segments(segments)
            expected = encoder.eval()(x, src_key_padding_mask=~present)
            torch.testing.assert_close(bert(tokens, segments)[present], expected[present], rtol=1e-4, atol=1e-4)

    def test_sees_both_directions_where_gpt_sees_one(self, bert):
        tokens = torch.randint(5, V, (1, 12))
        changed = tokens.clone()
        changed[0, -1] = (changed[0, -1] + 1) % V
        gpt = Gpt(GptConfig(V, context=24, width=32, layers=3, heads=4)).eval()
        with torch.inference_mode():
            both = [bert(rows, torch.zeros_like(rows))[0, 0] for rows in (tokens, changed)]
            past = [gpt(rows)[0, 0] for rows in (tokens, changed)]
        assert (both[0] - both[1]).abs().max() > 1e-3
        assert torch.equal(*past)

    def test_padding_changes_nothing(self, bert):
        tokens = torch.randint(5, V, (2, 8))
        longer = nn.functional.pad(tokens, (0, 7), value=bert.config.pad)
        with torch.inference_mode():
            one, other = (bert(rows, torch.zeros_like(rows)) for rows in (tokens, longer))
        torch.testing.assert_close(one, other[:, :8], rtol=1e-5, atol=1e-5)

    def test_the_mean_leaves_padding_out(self):
        hidden = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [9.0, 9.0]]])
        found = mean_pool(hidden, torch.tensor([[True, True, False]]))
        torch.testing.assert_close(found, torch.full((1, 2), math.sqrt(0.5)))


class TestTraining:
    def test_baselines_and_measures_by_hand(self):
        pieces = WordPieceTokenizer([PAD, UNK, CLS, SEP, MASK, "a", "b"])
        held = HeldBack.__new__(HeldBack)
        targets = torch.tensor([[UNASKED, 5, 5, 6]])
        held.singles = []
        held.pairs = [Masked(torch.tensor([[2, 4, 4, 4]]), torch.zeros(1, 4).long(), targets, torch.tensor([1]))]
        train = encode_reading(Reading([], [[["a"], ["a"], ["b"]]]), pieces)
        found = baselines(train, held, len(pieces))
        assert found["uniform"] == pytest.approx(math.log(7))
        assert found["pairs_unigram"] == pytest.approx(-(2 * math.log(3 / 10) + math.log(2 / 10)) / 3)
        assert found["pairs_most_frequent_accuracy"] == pytest.approx(2 / 3)
        assert found["next_majority_accuracy"] == 1

    def test_learns_and_goes_on_after_a_stop(self, monkeypatch, tmp_path):
        """Documents that count up: gaps become far easier than by frequency, and what follows is known."""
        monkeypatch.setattr(train_bert, "load_reading", lambda corpus: (reading(), reading()))
        monkeypatch.setattr(train_bert, "STEPS_PER_EPOCH", 60)
        config = TrainBertConfig(
            epochs=5, learning_rate=3e-3, singles=8, pairs=32, pieces=40, context=24, width=32, layers=2, dropout=0.0,
            runs=tmp_path,
        )  # fmt: skip
        result = train_bert.train(config)
        assert result["measures"]["nats"] < result["baselines"]["unigram"] / 2
        assert result["measures"]["pairs_next_accuracy"] > 0.8
        before = (config.folder / "weights.pt").read_bytes()
        assert train_bert.train(config)["measures"] == result["measures"], "a finished run is not run again"
        assert (config.folder / "weights.pt").read_bytes() == before

    def test_measures_count_every_gap_once(self, bert):
        masker = Masker(WordPieceTokenizer([PAD, UNK, CLS, SEP, MASK, *map(str, range(V - 5))]), 24)
        rows = [list(range(5, 5 + size)) for size in (3, 9, 14, 20)]
        whole = masker.singles(rows, np.random.default_rng(0))
        parts = [
            Masked(*(value[row : row + 1] for value in (whole.tokens, whole.segments, whole.targets, whole.follows)))
            for row in range(4)
        ]
        assert measure(bert, [whole]) == pytest.approx(measure(bert, parts), abs=1e-5)
