"""The hand-written GRU and its attentions against torch's own modules, and what must hold for a translator of them."""

import math

import pytest
import torch
from torch import nn

from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.training.data import Encoded, PairBatches, padded
from services.nlp.training.decode import greedy
from services.nlp.training.losses import sentence_cross_entropy
from services.nlp.training.models.attention import AdditiveAttention, DotAttention
from services.nlp.training.models.gru import Gru, GruCell
from services.nlp.training.models.gru_translator import GruConfig, GruTranslator

INPUTS, WIDTH = 12, 16
LOOKING = ["none", "additive", "dot"]


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def disturb(module, by=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.eval()


def copy_cell(own, theirs):
    """Into an nn.GRU of one layer; the gates lie in the same order."""
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(own.input.weight)
        theirs.bias_ih_l0.copy_(own.input.bias)
        theirs.weight_hh_l0.copy_(own.hidden.weight)
        theirs.bias_hh_l0.copy_(own.hidden.bias)


@pytest.fixture(params=LOOKING)
def model(request):
    return disturb(GruTranslator(GruConfig(40, 50, WIDTH, request.param)))


class TestGru:
    def test_layer_is_torchs(self):
        own, theirs = disturb(Gru(INPUTS, WIDTH)), nn.GRU(INPUTS, WIDTH, batch_first=True)
        copy_cell(own.cell, theirs)
        x = torch.randn(5, 9, INPUTS)
        states, last = own(x, torch.ones(5, 9, dtype=torch.bool))
        expected, final = theirs(x)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(last, final[0], rtol=0, atol=1e-5)

    def test_masks_are_torchs_packing(self):
        own, theirs = disturb(Gru(INPUTS, WIDTH)), nn.GRU(INPUTS, WIDTH, batch_first=True)
        copy_cell(own.cell, theirs)
        x, lengths = torch.randn(4, 7, INPUTS), torch.tensor([3, 7, 1, 5])
        present = torch.arange(7)[None] < lengths[:, None]
        states, last = own(x, present)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        expected, final = theirs(packed)
        expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
        torch.testing.assert_close(last, final[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(states[present], expected[present], rtol=0, atol=1e-5)

    def test_gradients_are_torchs(self):
        own, theirs = disturb(Gru(INPUTS, WIDTH)), nn.GRU(INPUTS, WIDTH, batch_first=True)
        copy_cell(own.cell, theirs)
        x = torch.randn(3, 6, INPUTS)
        (own(x, torch.ones(3, 6, dtype=torch.bool))[0] ** 2).sum().backward()
        (theirs(x)[0] ** 2).sum().backward()
        pairs = ((own.cell.input, "ih"), (own.cell.hidden, "hh"))
        for linear, name in pairs:
            for kind in ("weight", "bias"):
                expected = getattr(theirs, f"{kind}_{name}_l0").grad
                torch.testing.assert_close(getattr(linear, kind).grad, expected, rtol=1e-4, atol=1e-4)

    def test_one_step_by_hand(self):
        cell = GruCell(1, 1)
        with torch.no_grad():
            cell.input.weight[:, 0], cell.input.bias[:] = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3])
            cell.hidden.weight[:, 0], cell.hidden.bias[:] = (
                torch.tensor([1.0, 0.7, -0.4]),
                torch.tensor([0.0, 0.5, 0.6]),
            )
        x, h = 0.8, 0.25
        sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
        r = sigmoid(0.5 * x + 0.1 + 1.0 * h + 0.0)
        z = sigmoid(-1.0 * x + 0.2 + 0.7 * h + 0.5)
        n = math.tanh(2.0 * x + 0.3 + r * (-0.4 * h + 0.6))
        found = cell(cell.input(torch.tensor([[x]])), torch.tensor([[h]]))
        assert found.item() == pytest.approx((1 - z) * n + z * h, abs=1e-6)


class TestAttentions:
    def test_additive_by_a_naive_loop(self):
        own = disturb(AdditiveAttention(WIDTH))
        state, memory = torch.randn(3, WIDTH), torch.randn(3, 5, WIDTH)
        found = own(state, own.keys(memory))
        for row in range(3):
            for i in range(5):
                inner = torch.tanh(own.query.weight @ state[row] + own.memory.weight @ memory[row, i])
                assert found[row, i].item() == pytest.approx((own.score.weight[0] @ inner).item(), abs=1e-5)

    def test_dot_is_torchs_attention_without_scale(self):
        own, state, memory = DotAttention(), torch.randn(3, WIDTH), torch.randn(3, 5, WIDTH)
        weights = torch.softmax(own(state, own.keys(memory)), dim=-1)
        expected = nn.functional.scaled_dot_product_attention(state[:, None], memory, memory, scale=1.0)
        torch.testing.assert_close(weights[:, None] @ memory, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("looking", LOOKING[1:])
    def test_weights_add_up_and_padding_gets_none(self, looking):
        model = disturb(GruTranslator(GruConfig(40, 50, WIDTH, looking)))
        memory = model.read(torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD]]))
        _, features, weights = model.advance(torch.randn(2, 3 * WIDTH), memory.state, memory)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))
        assert (weights[1, 2:] == 0).all()
        assert (weights[0] > 0).all()
        torch.testing.assert_close(features[:, WIDTH:], (weights[:, :, None] * memory.states).sum(1))

    def test_the_cell_reads_the_embedding_and_the_context(self):
        """The split input matrix is that of an nn.GRUCell on [embedding; c]."""
        model = disturb(GruTranslator(GruConfig(40, 50, WIDTH, "additive")))
        theirs = nn.GRUCell(2 * WIDTH, WIDTH)
        with torch.no_grad():
            theirs.weight_ih.copy_(torch.cat((model.decoder.input.weight, model.context.weight), dim=1))
            theirs.bias_ih.copy_(model.decoder.input.bias)
            theirs.weight_hh.copy_(model.decoder.hidden.weight)
            theirs.bias_hh.copy_(model.decoder.hidden.bias)
        memory = model.read(torch.tensor([[5, 6, 7, EOS]]))
        embedded = model.target(torch.tensor([9]))
        state, features, weights = model.advance(model.decoder.input(embedded), memory.state, memory)
        context = (weights[:, :, None] * memory.states).sum(1)
        expected = theirs(torch.cat((embedded, context), dim=-1), memory.state)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(features, torch.cat((expected, context), dim=-1), rtol=0, atol=1e-5)


class TestTranslator:
    def test_without_attention_it_is_torchs_encoder_and_decoder(self):
        model = disturb(GruTranslator(GruConfig(40, 50, WIDTH)))
        encoder, decoder = (nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        copy_cell(model.encoder.cell, encoder)
        copy_cell(model.decoder, decoder)
        source, target = torch.randint(4, 40, (3, 6)), torch.randint(4, 50, (3, 5))
        _, last = encoder(model.source(source))
        expected = model.output(decoder(model.target(target), last)[0])
        torch.testing.assert_close(model((source, target)), expected, rtol=0, atol=1e-5)

    def test_the_reports_sizes_have_the_reports_number_of_weights(self):
        count = lambda model: sum(parameter.numel() for parameter in model.parameters())  # noqa: E731
        cell = 2 * (256 + 1) * 768
        assert count(GruTranslator(GruConfig(3725, 4405))) == (3725 + 4405) * 256 + 2 * cell + 257 * 4405 == 4_002_869
        attention = 256 * 768 + 2 * 256 * 256 + 256
        assert count(GruTranslator(GruConfig(3725, 4405, attention="additive"))) == 4_002_869 + attention + 256 * 4405

    @torch.inference_mode()
    def test_padding_changes_nothing(self, model):
        sources = [torch.randint(4, 40, (length,)).tolist() for length in (3, 8, 1)]
        targets = [torch.randint(4, 50, (length,)).tolist() for length in (6, 2, 4)]
        together = model((nn.functional.pad(padded(sources), (0, 5)), nn.functional.pad(padded(targets), (0, 3))))
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            alone = model((torch.tensor([source]), torch.tensor([target])))[0]
            torch.testing.assert_close(together[row, : len(target)], alone, rtol=0, atol=1e-5)

    @torch.inference_mode()
    def test_a_token_changes_nothing_before_it(self, model):
        source, target = torch.randint(4, 40, (2, 5)), torch.randint(4, 50, (2, 6))
        before = model((source, target))
        for at in range(6):
            changed = target.clone()
            changed[:, at] = (changed[:, at] - 4 + 7) % 46 + 4
            after = model((source, changed))
            assert torch.equal(after[:, :at], before[:, :at])
            assert (after[:, at:] - before[:, at:]).abs().amax(-1).min() > 1e-4

    @torch.inference_mode()
    def test_free_running_reads_its_own_words(self, model):
        source, target = torch.randint(4, 40, (4, 5)), torch.randint(4, 50, (4, 7))
        target[:, 0] = BOS
        free = model((source, target, False))
        said = torch.cat((target[:, :1], free.argmax(-1)[:, :-1]), dim=1)
        torch.testing.assert_close(model((source, said, True)), free, rtol=0, atol=1e-5)
        torch.testing.assert_close(model((source, said)), free, rtol=0, atol=1e-5)
        assert (model((source, target)) - free).abs().max() > 1e-3

    def test_free_running_learns_too(self, model):
        source, target = torch.randint(4, 40, (4, 5)), torch.randint(4, 50, (4, 7))
        model.train()((source, target, False)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.source.weight.grad[source.flatten()].abs().sum() > 0

    @torch.inference_mode()
    def test_step_by_step_is_at_once(self, model):
        source, target = padded([[5, 6, 7, 8, EOS], [9, EOS]]), torch.randint(4, 50, (2, 7))
        at_once, state = model((source, target)), model.start(source)
        for position in range(7):
            logits, state = model.proceed(target[:, position], state)
            torch.testing.assert_close(logits, at_once[:, position], rtol=0, atol=1e-5)

    def test_greedy_does_not_depend_on_the_batch(self, model):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3)  # so that it says something else for every source
        sources = [[*torch.randint(4, 40, (length,)).tolist(), EOS] for length in (1, 2, 2, 5, 9, 3, 7) * 3]
        alone = greedy(model, sources, 9, batch=1)
        assert greedy(model, sources, 9) == greedy(model, sources, 9, batch=4) == alone
        assert len(set(map(tuple, alone))) > 5


class TestTraining:
    def test_loss_is_a_sentences(self):
        logits, targets = torch.randn(3, 4, 6), torch.tensor([[2, 4, 5, 2], [5, 2, PAD, PAD], [2, PAD, PAD, PAD]])
        log_p = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        expected = -sum(log_p[row, : (targets[row] != PAD).sum()].sum().item() for row in range(3)) / 3
        assert sentence_cross_entropy(logits, targets).item() == pytest.approx(expected, abs=1e-5)

    def test_teacher_forcing_is_drawn_for_each_step_of_a_seed(self):
        pairs = Encoded([[5, EOS]] * 400, [[6, EOS]] * 400)
        always, sometimes, other = (
            PairBatches(pairs, 1, seed, share) for seed, share in ((0, 1.0), (0, 0.2), (1, 0.2))
        )
        assert len(always.batch(0, 0)[0]) == 2
        drawn = [sometimes.batch(0, step)[0][2] for step in range(400)]
        assert drawn == [sometimes.is_forced(0, step) for step in range(400)]
        assert 0.12 < sum(drawn) / 400 < 0.28
        assert drawn != [other.is_forced(0, step) for step in range(400)]
        assert drawn != [sometimes.is_forced(1, step) for step in range(400)]
        assert torch.equal(always.batch(3, 7)[1], sometimes.batch(3, 7)[1])
