"""The hand-written Transformer against torch's own modules, and what must hold for any translator."""

import itertools
import math

import pytest
import torch
from torch import nn

from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.training.data import Encoded, PairBatches, padded, shifted
from services.nlp.training.decode import greedy
from services.nlp.training.losses import token_cross_entropy
from services.nlp.training.models.attention import MultiHeadAttention, causal_mask, padding_mask
from services.nlp.training.models.dropout import Dropout
from services.nlp.training.models.transformer import (
    DecoderLayer,
    EncoderLayer,
    Transformer,
    TransformerConfig,
    sinusoids,
)

WIDTH, HEADS = 32, 4
CONFIG = TransformerConfig(
    source_vocabulary=40, target_vocabulary=50, width=WIDTH, feed_forward=48, layers=2, heads=HEADS, dropout=0.0
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    made = Transformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # nothing stays at zero or one, where a mistake would not show
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def talkative():
    """Says something else for every source, of every length."""
    torch.manual_seed(0)
    made = Transformer(CONFIG).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "table" not in name:
                weight.mul_(3)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    sources = [[*torch.randint(4, 40, (length,)).tolist(), EOS] for length in (1, 2, 2, 5, 9, 3, 7) * 4]
    return made, sources


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def copy_attention(own, theirs):
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((own.query.weight, own.keys_values.weight)))
        theirs.in_proj_bias.copy_(torch.cat((own.query.bias, own.keys_values.bias)))
        theirs.out_proj.load_state_dict(own.output.state_dict())


def copy_rest(own, theirs, norms):
    theirs.linear1.load_state_dict(own.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(own.feed_forward[3].state_dict())
    for number, norm in enumerate(norms):
        norm.load_state_dict(own.norms[number].state_dict())


def lengths_to_present(lengths, most):
    return torch.arange(most)[None] < torch.tensor(lengths)[:, None]


class TestAttention:
    @pytest.mark.parametrize("heads", [1, 4, 8])
    def test_is_torchs(self, heads):
        own = disturb(MultiHeadAttention(WIDTH, heads, dropout=0.0))
        theirs = nn.MultiheadAttention(WIDTH, heads, batch_first=True).eval()
        copy_attention(own, theirs)
        queries, memory = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)
        present = lengths_to_present([7, 4, 1], 7)
        for mask, hidden in ((None, None), (padding_mask(present), ~present)):
            keys, values = own.project(memory)
            answer, weights = own.attend(queries, keys, values, mask)
            expected, looked = theirs(
                queries, memory, memory, key_padding_mask=hidden, average_attn_weights=False, need_weights=True
            )
            torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(weights, looked, rtol=0, atol=1e-6)
            torch.testing.assert_close(own(queries, memory, mask), expected, rtol=0, atol=1e-5)

    def test_causal_is_torchs(self):
        own = disturb(MultiHeadAttention(WIDTH, HEADS, dropout=0.0))
        theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
        copy_attention(own, theirs)
        x = torch.randn(2, 6, WIDTH)
        expected, _ = theirs(x, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).triu(1))
        torch.testing.assert_close(own(x, x, causal_mask(6)), expected, rtol=0, atol=1e-5)

    def test_by_hand(self):
        own = MultiHeadAttention(2, 1, dropout=0.0)
        with torch.no_grad():
            own.query.weight.copy_(torch.eye(2))
            own.keys_values.weight.copy_(torch.cat((torch.eye(2), torch.eye(2))))
            own.output.weight.copy_(torch.eye(2))
            for linear in (own.query, own.keys_values, own.output):
                linear.bias.zero_()
        x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        high = math.exp(1 / math.sqrt(2))  # the divisor is the root of d_k, not of anything else
        expected = torch.tensor([[[high, 1.0], [1.0, high]]]) / (high + 1)
        torch.testing.assert_close(own(x, x), expected)

    def test_divides_by_the_width_of_a_head(self):
        assert MultiHeadAttention(WIDTH, 8, 0.0).head_width == 4
        with pytest.raises(ValueError, match="32 is no multiple of 5"):
            MultiHeadAttention(WIDTH, 5, 0.0)

    def test_hidden_positions_get_nothing_and_rows_add_up(self):
        own = disturb(MultiHeadAttention(WIDTH, HEADS, 0.0))
        present = lengths_to_present([3, 6], 6)
        keys, values = own.project(torch.randn(2, 6, WIDTH))
        _, weights = own.attend(torch.randn(2, 4, WIDTH), keys, values, padding_mask(present))
        assert (weights[0, ..., 3:] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 4))


class TestLayers:
    def test_encoder_layer_is_torchs(self):
        own = disturb(EncoderLayer(CONFIG))
        theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=True).eval()
        copy_attention(own.attention, theirs.self_attn)
        copy_rest(own, theirs, [theirs.norm1, theirs.norm2])
        x, present = torch.randn(3, 7, WIDTH), lengths_to_present([7, 4, 2], 7)
        ours, expected = own(x, padding_mask(present)), theirs(x, src_key_padding_mask=~present)
        torch.testing.assert_close(ours[present], expected[present], rtol=0, atol=1e-5)

    def test_decoder_layer_is_torchs(self):
        own = disturb(DecoderLayer(CONFIG))
        theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=True).eval()
        copy_attention(own.self_attention, theirs.self_attn)
        copy_attention(own.cross_attention, theirs.multihead_attn)
        copy_rest(own, theirs, [theirs.norm1, theirs.norm2, theirs.norm3])
        x, memory, present = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH), lengths_to_present([7, 4, 1], 7)
        ours = own(x, causal_mask(5), own.cross_attention.project(memory), padding_mask(present))
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected = theirs(x, memory, tgt_mask=future, memory_key_padding_mask=~present)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    def test_gradients_are_torchs(self):
        own = disturb(EncoderLayer(CONFIG))
        theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=True)
        copy_attention(own.attention, theirs.self_attn)
        copy_rest(own, theirs, [theirs.norm1, theirs.norm2])
        x = torch.randn(2, 4, WIDTH)
        (own(x, torch.zeros(1, 1, 1, 4)) ** 2).sum().backward()
        (theirs(x) ** 2).sum().backward()
        ours = own.attention
        grads = torch.cat((ours.query.weight.grad, ours.keys_values.weight.grad))
        torch.testing.assert_close(grads, theirs.self_attn.in_proj_weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.norms[1].weight.grad, theirs.norm2.weight.grad, rtol=1e-3, atol=1e-3)


class TestTransformer:
    def test_sinusoids_by_the_formula(self):
        table = sinusoids(50, 16)
        for p, i in itertools.product((0, 1, 7, 49), range(8)):
            angle = p / 10000 ** (2 * i / 16)
            assert table[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)

    def test_what_enters_is_the_scaled_embedding_and_its_position(self, model):
        tokens = torch.tensor([[7, 9]])
        expected = model.target.table.weight[[7, 9]] * math.sqrt(WIDTH) + sinusoids(2, WIDTH)
        torch.testing.assert_close(model.target(tokens, torch.arange(2))[0], expected)
        torch.testing.assert_close(model.target(tokens, torch.tensor([[0, 1]]))[0], expected)

    def test_embeddings_enter_with_variance_1(self):
        large = Transformer(TransformerConfig(3000, 3000, width=64, feed_forward=8, layers=1, heads=1))
        for part in (large.source, large.target):
            assert part.table.weight.std().item() == pytest.approx(64**-0.5, abs=0.003)
            assert part.scale == 8

    def test_the_output_layer_is_the_targets_embedding(self, model):
        x = torch.randn(3, WIDTH)
        torch.testing.assert_close(model.logits(x), model.decoder_norm(x) @ model.target.table.weight.T)
        names = [name for name, _ in model.named_parameters()]
        assert sum("table" in name for name in names) == 2
        tied = Transformer(CONFIG)
        tied((torch.tensor([[5, EOS]]), torch.tensor([[BOS]]))).sum().backward()
        assert tied.target.table.weight.grad[20].abs().sum() > 0  # never read, but every row is written to

    def test_the_number_of_weights_by_hand(self, model):
        linear = lambda inputs, outputs: (inputs + 1) * outputs  # noqa: E731
        attention = 4 * linear(WIDTH, WIDTH)
        feed_forward = linear(WIDTH, 48) + linear(48, WIDTH)
        encoder = 2 * (attention + feed_forward + 2 * 2 * WIDTH)
        decoder = 2 * (2 * attention + feed_forward + 3 * 2 * WIDTH)
        expected = (40 + 50) * WIDTH + encoder + decoder + 2 * 2 * WIDTH
        assert sum(parameter.numel() for parameter in model.parameters()) == expected

    def test_biases_begin_at_zero_and_norms_at_one(self):
        for name, weight in Transformer(CONFIG).named_parameters():
            if name.endswith("bias"):
                assert (weight == 0).all(), name
            elif "norm" in name:
                assert (weight == 1).all(), name

    @torch.inference_mode()
    def test_a_token_changes_nothing_before_it(self, model):
        source, target = torch.randint(4, 40, (2, 6)), torch.randint(4, 50, (2, 9))
        before = model((source, target))
        for at in range(9):
            changed = target.clone()
            changed[:, at] = (changed[:, at] - 4 + 11) % 46 + 4
            after = model((source, changed))
            assert torch.equal(after[:, :at], before[:, :at])
            assert (after[:, at:] - before[:, at:]).abs().amax(-1).min() > 1e-4

    @torch.inference_mode()
    def test_every_source_token_counts_wherever_it_is(self, model):
        source, target = torch.randint(4, 40, (1, 6)), torch.randint(4, 50, (1, 3))
        before = model((source, target))
        for at in range(6):
            changed = source.clone()
            changed[0, at] = (changed[0, at] - 4 + 5) % 36 + 4
            assert (model((changed, target)) - before).abs().max() > 1e-3
        assert (model((source.flip(1), target)) - before).abs().max() > 1e-3  # and so does its place

    @torch.inference_mode()
    def test_padding_changes_nothing(self, model):
        sources = [torch.randint(4, 40, (length,)).tolist() for length in (3, 8, 1)]
        targets = [torch.randint(4, 50, (length,)).tolist() for length in (6, 2, 4)]
        together = model((nn.functional.pad(padded(sources), (0, 5)), nn.functional.pad(padded(targets), (0, 3))))
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            alone = model((torch.tensor([source]), torch.tensor([target])))[0]
            torch.testing.assert_close(together[row, : len(target)], alone, rtol=0, atol=2e-5)

    @torch.inference_mode()
    def test_step_by_step_with_a_cache_is_decoding_at_once(self, model):
        source = padded([[5, 6, 7, 8, EOS], [9, EOS]])
        target = torch.randint(4, 50, (2, 7))
        memory, present = model.encode(source), source != PAD
        at_once = model.decode(target, memory, present)
        cross, empty = model.cross(memory), torch.zeros(2, HEADS, 0, WIDTH // HEADS)
        cache = [(empty, empty)] * CONFIG.layers
        for position in range(7):
            x = model.target(target[:, position : position + 1], torch.tensor([position]))
            for number, layer in enumerate(model.decoder):
                hidden = torch.zeros(2, 1, 1, position + 1)
                x, new, weights = layer.step(x, cache[number], hidden, cross[number], padding_mask(present))
                cache[number] = tuple(torch.cat(pair, dim=2) for pair in zip(cache[number], new, strict=True))
                assert (weights[1, ..., 2:] == 0).all()
            torch.testing.assert_close(model.logits(x)[:, 0], at_once[:, position], rtol=0, atol=2e-5)

    def test_greedy_is_a_loop_that_decodes_everything_again(self, talkative):
        model, sources = talkative
        expected = []
        with torch.inference_mode():
            for source in sources:
                memory, present = model.encode(torch.tensor([source])), torch.ones(1, len(source), dtype=torch.bool)
                tokens = [BOS]
                while len(tokens) <= 12 and tokens[-1] != EOS:
                    tokens.append(int(model.decode(torch.tensor([tokens]), memory, present)[0, -1].argmax()))
                expected.append([token for token in tokens[1:] if token != EOS])
        assert len(set(map(len, expected))) > 3
        assert len(set(map(tuple, expected))) > 20
        for batch in (1, 5, 64):
            assert greedy(model, sources, 12, batch=batch) == expected
        assert greedy(model, sources, 3) == [tokens[:3] for tokens in expected]
        assert greedy(model, [], 5) == []


class TestDropout:
    @pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.9])
    def test_rate_and_mean(self, probability):
        value = torch.ones(401, 1003)  # no multiple of four
        dropped = Dropout(probability).train()(value)
        count = value.numel()
        rate = (dropped == 0).double().mean().item()
        assert rate == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / count))
        kept = dropped[dropped != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - probability)))
        assert dropped.mean().item() == pytest.approx(1, abs=0.02)

    def test_decisions_are_independent(self):
        kept = (Dropout(0.5).train()(torch.ones(400_000)) != 0).double() - 0.5
        for distance in (1, 2, 3, 4, 8, 16):
            assert (kept[:-distance] * kept[distance:]).mean().abs() < 0.25 * 5 / math.sqrt(400_000)
        for lane in range(4):
            assert kept[lane::4].mean().abs() < 0.5 * 5 / math.sqrt(100_000)

    def test_off_in_eval_mode_and_at_zero(self):
        value = torch.randn(5, 7)
        assert Dropout(0.5).eval()(value) is value
        assert Dropout(0.0).train()(value) is value

    def test_the_gradient_passes_where_the_value_did(self):
        value = torch.randn(50, 30, requires_grad=True)
        dropped = Dropout(0.4).train()(value)
        dropped.sum().backward()
        expected = torch.where(dropped == 0, 0.0, 1 / 0.6)
        torch.testing.assert_close(value.grad, expected)

    def test_the_seed_decides(self):
        module, value = Dropout(0.5).train(), torch.ones(1000)
        torch.manual_seed(3)
        first, second = module(value), module(value)
        torch.manual_seed(3)
        assert torch.equal(module(value), first)
        assert not torch.equal(first, second)

    def test_types_and_shapes(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            dropped = Dropout(0.5).train()(torch.ones(3, 1, 5, dtype=dtype))
            assert (dropped.dtype, dropped.shape) == (dtype, (3, 1, 5))
        assert Dropout(0.5).train()(torch.ones(0, 4)).shape == (0, 4)

    def test_it_is_where_it_should_be(self):
        model = Transformer(TransformerConfig(20, 20, width=16, feed_forward=16, layers=1, heads=2, dropout=0.3))
        rates = [module.probability for module in model.modules() if isinstance(module, Dropout)]
        assert rates == [0.3] * 9  # 2 embeddings; 1 + 2 attentions; 2 feed-forward parts; 2 layers' outputs
        pair = torch.randint(4, 20, (2, 5)), torch.randint(4, 20, (2, 5))
        assert not torch.equal(model.train()(pair), model(pair))
        assert torch.equal(model.eval()(pair), model(pair))


class TestLoss:
    def test_cross_entropy_by_the_formula(self):
        logits, targets = torch.randn(3, 4, 6), torch.tensor([[2, 4, 5, 2], [5, 2, PAD, PAD], [2, PAD, PAD, PAD]])
        log_p = logits.double().log_softmax(-1)
        real = targets != PAD
        picked = log_p.gather(-1, targets[..., None])[..., 0][real]
        assert token_cross_entropy()(logits, targets).item() == pytest.approx(-picked.mean().item(), abs=1e-6)
        smooth = -0.9 * picked - 0.1 * log_p.mean(-1)[real]
        assert token_cross_entropy(0.1)(logits, targets).item() == pytest.approx(smooth.mean().item(), abs=1e-6)

    def test_padding_counts_for_nothing(self):
        logits, targets = torch.randn(2, 3, 6), torch.tensor([[4, 2, PAD], [2, PAD, PAD]])
        loss, garbage = token_cross_entropy(0.1), logits.clone()
        garbage[targets == PAD] = 1e3 * torch.randn(3, 6)
        assert loss(logits, targets) == loss(garbage, targets)


class TestBatches:
    def pairs(self, count=500):
        lengths = torch.randint(1, 15, (count, 2)).tolist()
        return Encoded(
            [[*torch.randint(4, 40, (a,)).tolist(), EOS] for a, _ in lengths],
            [[*torch.randint(4, 50, (b,)).tolist(), EOS] for _, b in lengths],
        )

    def test_shapes_by_hand(self):
        batches = PairBatches(Encoded([[5, 6, EOS], [7, EOS]], [[8, EOS], [9, 10, EOS]]), 2, seed=0)
        (source, read), target = batches.batch(0, 0)
        assert sorted(source.tolist()) == [[5, 6, EOS], [7, EOS, PAD]]
        assert sorted(target.tolist()) == [[8, EOS, PAD], [9, 10, EOS]]
        assert sorted(read.tolist()) == [[BOS, 8, EOS], [BOS, 9, 10]]
        assert shifted(torch.tensor([[4, 5, EOS]])).tolist() == [[BOS, 4, 5]]

    def test_an_epoch_sees_every_pair_once_and_depends_on_the_seed_alone(self):
        pairs = self.pairs()

        def seen(seed, epoch):
            batches = PairBatches(pairs, 48, seed)
            assert batches.steps_per_epoch == 11
            rows = []
            for step in range(batches.steps_per_epoch):
                (source, _), target = batches.batch(epoch, step)
                for one, other in zip(source.tolist(), target.tolist(), strict=True):
                    rows.append(tuple(tuple(i for i in ids if i != PAD) for ids in (one, other)))
            return rows

        whole = sorted(zip(map(tuple, pairs.source), map(tuple, pairs.target), strict=True))
        assert sorted(seen(0, 0)) == whole
        assert seen(0, 0) == seen(0, 0)
        assert len({tuple(seen(*at)) for at in ((0, 0), (0, 1), (1, 0))}) == 3

    def test_like_lengths_share_a_batch(self):
        pairs = self.pairs(2000)
        batches = PairBatches(pairs, 50, seed=0)
        sorted_padding = sum((batches.batch(0, step)[1] == PAD).sum().item() for step in range(40))
        plain_padding = sum((padded(pairs.target[at : at + 50]) == PAD).sum().item() for at in range(0, 2000, 50))
        assert sorted_padding < plain_padding / 10
