"""The language model: what it may see, its cache, its learning; and how its text is chosen and cut."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from services.nlp.serving.generator import windows
from services.nlp.serving.sampling import FIRST_PIECE, Sampler, SamplingSettings, StopStrings
from services.nlp.tokenizers.characters import CharacterTokenizer, collect_characters
from services.nlp.tokenizers.special import UNK
from services.nlp.training.graphs import GptGraph
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.train_gpt import Windows, baselines, held_out_loss
from shared.errors import ConfigurationError

V = 40


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = Gpt(GptConfig(V, context=24, width=32, layers=3, heads=4)).eval()
    for weight in model.parameters():  # larger than at the start, so that every part counts
        torch.nn.init.normal_(weight, std=0.3)
    return model


@torch.inference_mode()
def reference(model, tokens):
    """GPT-2's formulae over the same weights, one sequence, one head at a time."""
    config, T = model.config, len(tokens)
    x = model.tokens.weight[tokens] + model.positions.weight[:T]
    for block in model.blocks:
        attention, width = block.attention, config.width // config.heads
        h = F.layer_norm(x, (config.width,), block.norms[0].weight, block.norms[0].bias)
        q = h @ attention.query.weight.T + attention.query.bias
        k, v = (h @ attention.keys_values.weight.T + attention.keys_values.bias).split(config.width, dim=-1)
        heads = []
        for head in range(config.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            scores[torch.ones(T, T, dtype=torch.bool).triu(1)] = -torch.inf
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ attention.output.weight.T + attention.output.bias
        h = F.layer_norm(x, (config.width,), block.norms[1].weight, block.norms[1].bias)
        first, _, second = block.feed_forward
        x = x + F.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    x = F.layer_norm(x, (config.width,), model.norm.weight, model.norm.bias)
    return x @ model.tokens.weight.T


class TestModel:
    def test_equals_the_formulae(self, gpt):
        tokens = torch.randint(V, (3, 24))
        with torch.inference_mode():
            logits = gpt(tokens)
        for row, expected in enumerate(reference(gpt, one) for one in tokens):
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)

    def test_sees_only_what_came_before(self, gpt):
        tokens = torch.randint(V, (2, 20))
        changed = tokens.clone()
        changed[:, 11] = (changed[:, 11] + 1) % V
        with torch.inference_mode():
            one, other = gpt(tokens), gpt(changed)
        assert torch.equal(one[:, :11], other[:, :11])
        assert (one[:, 11:] - other[:, 11:]).abs().amax(dim=-1).min() > 1e-3, "and everything after changes"

    @pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 11], [19, 1]])
    def test_with_a_cache_equals_without(self, gpt, cuts):
        tokens = torch.randint(V, (2, 20))
        graph, config = GptGraph(gpt), gpt.config
        with torch.inference_mode():
            expected = gpt(tokens).log_softmax(-1)
            # a cache with room for more, whose hidden part is rubbish
            cache = [torch.full((2, config.heads, 22, config.width // config.heads), 9.0) for _ in range(6)]
            begin = 0
            for cut in cuts:
                found, *new = graph(tokens[:, begin : begin + cut], torch.full((2,), begin), cache)
                torch.testing.assert_close(found, expected[:, begin : begin + cut], rtol=0, atol=1e-5)
                for old, own in zip(cache, new, strict=True):
                    old[:, :, begin : begin + cut] = own
                begin += cut

    def test_rows_at_different_positions_share_a_step(self, gpt):
        graph, config = GptGraph(gpt), gpt.config
        tokens = torch.randint(V, (2, 20))
        with torch.inference_mode():
            expected = gpt(tokens).log_softmax(-1)
            full = [torch.full((2, config.heads, 22, config.width // config.heads), 9.0) for _ in range(6)]
            _, *made = graph(tokens, torch.zeros(2, dtype=torch.int64), full)
            for old, own in zip(full, made, strict=True):
                old[:, :, :20] = own
            positions = torch.tensor([3, 17])
            found, *_ = graph(tokens[[0, 1], positions][:, None], positions, full)
        for row, position in enumerate(positions):
            torch.testing.assert_close(found[row, 0], expected[row, position], rtol=0, atol=1e-5)

    def test_begins_by_guessing_evenly(self):
        torch.manual_seed(1)
        model = Gpt(GptConfig(65 + 4, context=64)).eval()
        tokens = torch.randint(69, (8, 65))
        with torch.inference_mode():
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert loss == pytest.approx(math.log(69), abs=0.1)

    def test_output_is_tied_to_the_embedding(self, gpt):
        assert not any("logits" in name or name.startswith("output") for name, _ in gpt.named_parameters())
        width, layers = gpt.config.width, gpt.config.layers
        per_layer = 12 * width**2 + 13 * width  # 4 + 8 matrices with biases 4 + 5, two norms of 2
        assert sum(p.numel() for p in gpt.parameters()) == (V + 24) * width + layers * per_layer + 2 * width

    def test_learns_a_batch_by_heart(self):
        torch.manual_seed(2)
        model = Gpt(GptConfig(V, context=16, width=48, layers=2, heads=4))
        tokens = torch.randint(V, (4, 17))
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(200):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss < 0.05:
                break
        assert loss < 0.05


class TestMeasuring:
    @pytest.mark.parametrize("lengths", [torch.ones(V, dtype=torch.int64), torch.arange(V) % 4 + 1])
    def test_held_out_loss_counts_each_position_once(self, gpt, lengths):
        """Nats of tokens, divided by their characters."""
        ids, context = torch.randint(V, (97,)), 24
        total, count = 0.0, 0
        for start in range(0, 97 - context - 1, 12):
            with torch.inference_mode():
                logits = gpt(ids[None, start : start + context])[0]
            for at in range(12, 24):
                total -= logits[at].log_softmax(-1)[ids[start + at + 1]].item()
                count += lengths[ids[start + at + 1]].item()
        assert held_out_loss(gpt, ids, context, lengths, batch=3) == pytest.approx(total / count, abs=1e-5)

    def test_baselines_by_hand(self):
        train, held = torch.tensor([4, 5, 4, 5, 4]), torch.tensor([4, 5])
        found = baselines(train, held, size=6)
        assert found["uniform"] == pytest.approx(math.log(2))
        assert found["unigram"] == pytest.approx(-(math.log(4 / 11) + math.log(3 / 11)) / 2)
        assert found["bigram"] == pytest.approx(-math.log(3 / 8))  # 4 is followed by 5 twice, plus one, of 2 + 6

    def test_windows_depend_on_epoch_and_step_alone(self):
        source = Windows(torch.arange(1000), context=8, batch=4, seed=3)
        inputs, targets = source.batch(2, 5)
        again, _ = Windows(torch.arange(1000), context=8, batch=4, seed=3).batch(2, 5)
        assert torch.equal(inputs, again)
        assert torch.equal(targets, inputs + 1)
        assert not torch.equal(inputs, source.batch(2, 6)[0])

    @pytest.mark.parametrize("context", [4, 9, 64])
    @pytest.mark.parametrize("length", [2, 3, 5, 10, 64, 65, 66, 200])
    def test_scoring_windows_predict_every_token_once_and_see_enough(self, context, length):
        predicted = []
        for begin, skip in windows(length, context):
            last = min(length, begin + context + 1)
            predicted += [(at + 1, at - begin + 1) for at in range(begin + skip, last - 1)]
        assert [token for token, _ in predicted] == list(range(1, length))
        assert all(seen >= min(token, context // 2) for token, seen in predicted)


class TestSampler:
    def log_probabilities(self, seed=0, size=30):
        return torch.tensor(np.random.default_rng(seed).normal(size=size) * 2).log_softmax(-1).float().numpy()

    def test_without_temperature_it_takes_the_most_probable(self):
        values = self.log_probabilities()
        values[2] = 0.0  # a special id, never chosen
        assert Sampler(SamplingSettings(temperature=0)).choose(values) == FIRST_PIECE + values[FIRST_PIECE:].argmax()

    @pytest.mark.parametrize(
        "settings",
        [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5, "temperature": 2}],
    )
    def test_frequencies_are_the_probabilities(self, settings):
        values, settings = self.log_probabilities(3), SamplingSettings(**settings, seed=1)
        sampler, draws = Sampler(settings), 4000
        counts = np.bincount([sampler.choose(values) for _ in range(draws)], minlength=len(values))
        expected = brute_force(values, settings)
        assert (counts[expected == 0] == 0).all()
        # five standard deviations of a binomial
        assert (np.abs(counts / draws - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()

    def test_the_seed_decides(self):
        values = self.log_probabilities(4)
        one, same, other = (
            [sampler.choose(values) for _ in range(20)]
            for sampler in (Sampler(SamplingSettings(seed=seed)) for seed in (7, 7, 8))
        )
        assert one == same != other


def brute_force(values, settings):
    """Probability of each id."""
    probabilities = np.exp(values.astype(np.float64) / settings.temperature)
    probabilities[:FIRST_PIECE] = 0
    order = np.argsort(-probabilities)
    if settings.top_k:
        probabilities[order[settings.top_k :]] = 0
    probabilities /= probabilities.sum()
    total = 0.0
    for index in order:
        if total >= settings.top_p:
            probabilities[index] = 0
        total += probabilities[index]
    return probabilities / probabilities.sum()


class TestStopStrings:
    @pytest.mark.parametrize("seed", range(30))
    def test_however_the_text_comes_it_ends_before_the_first_stop(self, seed):
        rng = np.random.default_rng(seed)
        text = "".join(rng.choice(list("ab"), 40))
        stops = ["".join(rng.choice(list("ab"), size)) for size in rng.integers(2, 6, 2)]
        end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
        cutter, shown, stopped, at = StopStrings(stops), "", False, 0
        while at < len(text) and not stopped:
            size = int(rng.integers(1, 4))
            piece, stopped = cutter.feed(text[at : at + size])
            shown, at = shown + piece, at + size
            assert shown == text[: len(shown)]
            if not stopped:
                assert len(shown) >= at - max(map(len, stops)) + 1, "no more is held back than a stop may need"
        if not stopped:
            shown += cutter.flush()
        # pieces of several characters may hold two stops of which the later one was complete first
        assert shown == text[:end] or (stopped and any(text[len(shown) :].startswith(stop) for stop in stops))

    def test_without_stops_nothing_is_held_back(self):
        assert StopStrings(()).feed("abc") == ("abc", False)


class TestCharacters:
    def test_round_trip_and_the_unknown(self):
        tokenizer = collect_characters("hello, wörld\n")
        assert tokenizer.decode(tokenizer.encode("low, old\n")) == "low, old\n"
        assert tokenizer.encode("z") == [UNK]
        assert CharacterTokenizer.from_json(tokenizer.to_json()).pieces == tokenizer.pieces

    @pytest.mark.parametrize(
        "text", ["", "{}", '{"kind": "bpe", "pieces": []}', '{"kind": "characters", "pieces": ["a"]}']
    )
    def test_another_file_is_refused(self, text):
        with pytest.raises(ConfigurationError):
            CharacterTokenizer.from_json(text)
