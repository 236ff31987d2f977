"""Beam search over random tables, against greedy search, exhaustive search and a slow beam search."""

import itertools
import math

import numpy as np
import pytest

from services.nlp.serving.search import NEVER, BeamSearch, SearchSettings
from services.nlp.tokenizers.special import BOS, EOS, PAD, UNK

WORDS = (4, 5, 6)
VOCABULARY = 7


class Table:
    """Log-probabilities of the next token by position and the last two tokens: [position, before, last, next]."""

    def __init__(self, seed, size=VOCABULARY, sharpness=2.0, steps=8):
        logits = sharpness * np.random.default_rng(seed).normal(size=(steps, size, size, size))
        self.values = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)

    def after(self, tokens):
        before, last = [BOS, BOS, *tokens][-2:]
        return self.values[min(len(tokens), len(self.values) - 1), before, last]

    def of(self, tokens, finished=True):
        """Log-probability of a whole hypothesis."""
        whole = [*tokens, EOS] if finished else tokens
        return sum(float(self.after(whole[:at])[token]) for at, token in enumerate(whole))


def look(tokens):
    """Attention that tells every history from every other."""
    return np.array([len(tokens), *tokens, *[0] * 12][:12], np.float32)


def run(table, settings, attention=False):
    search = BeamSearch(settings, keeps_attention=attention)
    rows = [[]]
    while True:
        assert search.rows == len(rows)
        looks = np.stack([look(row) for row in rows]) if attention else None
        following = search.advance(np.stack([table.after(row) for row in rows]), looks)
        if following is None:
            return search
        rows = [[*rows[parent], token] for parent, token in zip(following.parents, following.tokens, strict=True)]


def slow_beam(table, settings):
    """The same search written with lists and full sorts: (tokens, finished, score), best first."""
    running, pool, beam = [([], np.float32(0))], [], settings.beam

    def score(total, length):
        return float(total) / ((5 + length) / 6) ** settings.length_penalty

    for length in range(1, settings.max_tokens + 1):
        candidates = [
            (row, token, np.float32(total + table.after(tokens)[token]))
            for row, (tokens, total) in enumerate(running)
            for token in range(VOCABULARY)
            if token not in (PAD, BOS, UNK)
        ]
        candidates = sorted(candidates, key=lambda candidate: -candidate[2])[: 2 * beam]
        for row, token, total in candidates[:beam]:
            if token == EOS:
                pool.append((running[row][0], True, score(total, length)))
        going = [([*running[row][0], token], total) for row, token, total in candidates if token != EOS][:beam]
        if not going:
            running = []
            break
        running = going
        if len(pool) >= beam:
            worst = sorted((entry[2] for entry in pool), reverse=True)[beam - 1]
            if beam == 1 or max(score(total, settings.max_tokens + 1) for _, total in running) <= worst:
                running = []
                break
    pool += [(tokens, False, score(total, len(tokens))) for tokens, total in running]
    return sorted(pool, key=lambda entry: (not entry[1], -entry[2]))


def exhaustive(table, settings):
    """All finished hypotheses that fit into `max_tokens` steps, best first by their score."""
    found = []
    for length in range(settings.max_tokens):
        for tokens in itertools.product(WORDS, repeat=length):
            found.append((list(tokens), settings.normalised(table.of(tokens), length + 1)))
    return sorted(found, key=lambda entry: -entry[1])


@pytest.mark.parametrize("seed", range(60))
def test_beam_1_is_greedy(seed):
    table = Table(seed)
    tokens = []
    while len(tokens) < 12:
        values = table.after(tokens).copy()
        values[list(NEVER)] = -np.inf
        best = int(values.argmax())
        if best == EOS:
            break
        tokens.append(best)
    (found,) = run(table, SearchSettings(beam=1, max_tokens=12)).best(5)
    assert found.tokens == tokens
    assert found.finished == (len(tokens) < 12)
    assert found.log_probability == pytest.approx(table.of(tokens, found.finished), abs=1e-4)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_against_a_slow_beam_search(seed, beam):
    table = Table(seed, sharpness=1 + seed % 3)
    settings = SearchSettings(beam=beam, max_tokens=1 + seed % 9, length_penalty=(0, 0.6, 1, 2)[seed % 4])
    found = run(table, settings).best(beam)
    expected = slow_beam(table, settings)[:beam]
    assert [(one.tokens, one.finished) for one in found] == [(tokens, finished) for tokens, finished, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for *_, score in expected], abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(8))
def test_a_beam_as_wide_as_all_hypotheses_finds_the_best(seed, penalty):
    table = Table(seed)
    settings = SearchSettings(beam=3**5, max_tokens=5, length_penalty=penalty)
    found = run(table, settings).best(10)
    expected = exhaustive(table, settings)[:10]
    assert [one.tokens for one in found] == [tokens for tokens, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-4)


def best_score(table, beam, penalty=0.6):
    found = run(table, SearchSettings(beam=beam, max_tokens=5, length_penalty=penalty)).best(1)[0]
    return found.score if found.finished else -math.inf


def test_no_beam_beats_the_whole_and_wider_ones_are_better_on_the_whole():
    """A wider beam may do worse on one table (it prunes otherwise), so only these two are sure and likely."""
    tables = [Table(seed) for seed in range(100, 180)]
    widest = [best_score(table, 3**5) for table in tables]
    means = []
    for beam in (1, 2, 4, 8):
        scores = [best_score(table, beam) for table in tables]
        assert all(score <= best + 1e-5 for score, best in zip(scores, widest, strict=True))
        means.append(np.mean([max(score, -10) for score in scores]))
    assert means == sorted(means)
    assert means[-1] > means[0]


@pytest.mark.parametrize("seed", range(20))
def test_results_are_sorted_distinct_and_within_bounds(seed):
    table = Table(seed, sharpness=1.0)
    settings = SearchSettings(beam=6, max_tokens=7)
    search = run(table, settings)
    found = search.best(6)
    assert 1 <= len(found) <= 6
    assert [one for one in found if one.finished] == found[: sum(one.finished for one in found)]
    for finished in (True, False):
        scores = [one.score for one in found if one.finished is finished]
        assert scores == sorted(scores, reverse=True)
    assert len({tuple(one.tokens) for one in found}) == len(found)
    assert all(len(one.tokens) <= 7 for one in found)
    assert all(len(one.tokens) == 7 for one in found if not one.finished)
    assert all(token in WORDS for one in found for token in one.tokens)
    assert [one.tokens for one in search.best(2)] == [one.tokens for one in found[:2]]
    for one in found:
        length = len(one.tokens) + one.finished
        assert one.log_probability == pytest.approx(table.of(one.tokens, one.finished), abs=1e-4)
        assert one.score == pytest.approx(one.log_probability / ((5 + length) / 6) ** 0.6, abs=1e-9)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 200])
@pytest.mark.parametrize("beam", [1, 3])
def test_max_tokens_ends_the_search(max_tokens, beam):
    table = Table(0)
    table.values[..., EOS] = -100.0  # never of its own accord
    found = run(table, SearchSettings(beam=beam, max_tokens=max_tokens)).best(beam)
    assert [(len(one.tokens), one.finished) for one in found] == [(max_tokens, False)] * beam


@pytest.mark.parametrize("beam", [1, 3])
def test_ids_that_are_no_text_never_appear(beam):
    table = Table(1)
    table.values[..., list(NEVER)] = 5.0  # far more probable than everything else
    for found in run(table, SearchSettings(beam=beam, max_tokens=6)).best(beam):
        assert not set(found.tokens) & {PAD, BOS, UNK, EOS}


def test_a_certain_end_is_taken_at_once():
    table = Table(2)
    table.values[..., EOS] = 0.0
    table.values[..., list(WORDS)] = -50.0
    for beam in (1, 4):
        best = run(table, SearchSettings(beam=beam, max_tokens=50)).best(1)[0]
        assert (best.tokens, best.finished, best.log_probability) == ([], True, 0.0)


def test_a_search_without_a_way_on_ends():
    search = BeamSearch(SearchSettings(beam=3))
    assert search.advance(np.full((1, VOCABULARY), -np.inf, np.float32)) is None
    assert search.best(3) == []


def test_the_length_penalty_by_hand():
    assert SearchSettings(length_penalty=0).normalised(-6, 40) == -6
    assert SearchSettings(length_penalty=1).normalised(-6, 7) == -3
    assert SearchSettings(length_penalty=0.6).normalised(-6, 7) == pytest.approx(-6 / 2**0.6)
    assert SearchSettings(length_penalty=2).normalised(-6, 1) == -6


def test_a_larger_penalty_favours_longer_hypotheses():
    lengths = []
    for penalty in (0.0, 1.0, 2.0):
        settings = SearchSettings(beam=8, max_tokens=8, length_penalty=penalty)
        lengths.append(sum(len(run(Table(seed, sharpness=1.0), settings).best(1)[0].tokens) for seed in range(30)))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("beam", [1, 4])
def test_attention_stays_with_its_hypothesis(seed, beam):
    table = Table(seed, sharpness=1.0)
    settings = SearchSettings(beam=beam, max_tokens=6)
    found = run(table, settings, attention=True).best(beam)
    for one in found:
        expected = [look(one.tokens[:at]) for at in range(len(one.tokens) + one.finished)]
        assert np.array_equal(np.stack(one.attention), np.stack(expected))
    assert [one.tokens for one in run(table, settings).best(beam)] == [one.tokens for one in found]
    assert all(one.attention == [] for one in run(table, settings).best(beam))


def test_what_is_handed_in_stays_as_it_is():
    values = Table(0).after([])[None].copy()
    before = values.copy()
    BeamSearch(SearchSettings()).advance(values)
    assert np.array_equal(values, before)


def test_ties_are_broken_by_the_row_and_then_the_token():
    values = np.zeros((1, VOCABULARY), np.float32)
    following = BeamSearch(SearchSettings(beam=2)).advance(values)
    assert (following.parents, following.tokens) == ([0, 0], [4, 5])
