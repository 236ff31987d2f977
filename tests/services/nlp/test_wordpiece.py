"""WordPiece against brute force: the longest piece first, and joins that raise the likelihood most."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from services.nlp.preprocess import split_english
from services.nlp.tokenizers.wordpiece import (
    CONTINUED,
    LONGEST_WORD,
    SPECIAL_PIECES,
    UNK,
    WordPieceTokenizer,
    train_wordpiece,
)
from shared.errors import ConfigurationError

WORDS = ["low"] * 3 + ["lower"] * 2 + ["newest"] * 4 + ["widest"] * 2 + ["lowest", "new", "new", "wide"]


@pytest.fixture(scope="module")
def trained():
    return train_wordpiece(WORDS, 40)


def made_up_words(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcd", [8, 4, 2, 1], k=draw.randint(1, 9))) for _ in range(count)]


def greedy(word, known):
    """Longest match by trying every cut, longest first; no length limit, no cache."""
    parts, rest, mark = [], word, ""
    while rest:
        matches = [mark + rest[:n] for n in range(len(rest), 0, -1) if mark + rest[:n] in known]
        if not matches:
            return (UNK,)
        parts.append(matches[0])
        rest, mark = rest[len(matches[0]) - len(mark) :], CONTINUED
    return tuple(parts)


def brute_force(words, size):
    """The trainer without incremental counts: everything is counted anew for each join."""
    spelled = [[word[0], *(CONTINUED + c for c in word[1:])] for word in words]
    pieces = dict.fromkeys([*SPECIAL_PIECES, *sorted({part for parts in spelled for part in parts})])
    while len(pieces) < size:
        single = Counter(part for parts in spelled for part in parts)
        pairs = Counter(pair for parts in spelled for pair in pairwise(parts))
        total = sum(single.values())
        gains = {
            pair: count * math.log(count * total / (single[pair[0]] * single[pair[1]]))
            for pair, count in pairs.items()
            if count >= 2
        }
        best = min(gains, key=lambda pair: (-gains[pair], pair), default=None)
        if best is None or gains[best] <= 0:
            break
        piece = best[0] + best[1].removeprefix(CONTINUED)
        for parts in spelled:
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [piece]
                at += 1
        pieces[piece] = None
    return list(pieces)


class TestTraining:
    @pytest.mark.parametrize(("words", "size"), [(WORDS, 40), (made_up_words(300, 1), 60), (made_up_words(300, 2), 90)])
    def test_equals_counting_everything_anew(self, words, size):
        assert list(train_wordpiece(words, size).pieces) == brute_force(words, size)

    def test_joins_what_makes_the_text_most_probable_not_what_is_most_frequent(self):
        # `a` follows everything, so `xa` is frequent by chance; `q` is always followed by `u`
        words = ["xa"] * 6 + ["ya"] * 6 + ["a"] * 12 + ["x"] * 6 + ["y"] * 6 + ["qu"] * 5
        assert train_wordpiece(words, len(SPECIAL_PIECES) + 7).pieces[-1] == "qu"

    def test_its_size_is_what_was_asked_and_rare_characters_can_be_left_out(self):
        assert len(train_wordpiece(WORDS, 24)) == 24
        assert len(train_wordpiece(WORDS, 99)) < 40, "nothing is left to join"
        rare = train_wordpiece([*WORDS, "zoë"], 40, min_count=2)
        assert rare.split("zoë") == (UNK,)
        assert rare.split("newest") != (UNK,)

    def test_characters_that_do_not_fit_are_an_error(self):
        with pytest.raises(ConfigurationError, match="do not fit 6 pieces"):
            train_wordpiece(WORDS, 6)


class TestTokenizer:
    def test_takes_the_longest_piece_first_as_brute_force_does(self):
        pieces = train_wordpiece(made_up_words(400, 3), 80)
        known = set(pieces.pieces)
        for word in [*made_up_words(2000, 4), "abx", "x", ""]:
            assert pieces.split(word) == greedy(word, known), word

    def test_gives_every_training_word_back(self, trained):
        assert trained.decode(trained.encode(WORDS)) == WORDS

    def test_unknown_characters_make_one_unknown_word_and_so_does_length(self, trained):
        assert trained.split("new★") == (UNK,)
        assert trained.split("w" * LONGEST_WORD) != (UNK,)
        assert trained.split("w" * (LONGEST_WORD + 1)) == (UNK,)
        assert trained.decode(trained.encode(["new", "★", "low"])) == ["new", UNK, "low"]

    def test_its_file_gives_it_back(self, trained):
        assert WordPieceTokenizer.from_json(trained.to_json()).pieces == trained.pieces

    @pytest.mark.parametrize(
        "text", ["", "{}", '{"kind": "bpe", "pieces": []}', '{"kind": "wordpiece", "pieces": ["a"]}']
    )
    def test_another_file_is_refused(self, text):
        with pytest.raises(ConfigurationError, match="publish the model again"):
            WordPieceTokenizer.from_json(text)

    @pytest.mark.data
    def test_the_corpus_is_spelled_without_loss(self):
        from services.nlp.training.data import load_pairs

        words = [word for sentence in load_pairs("train").english[:3000] for word in sentence]
        words += split_english("Speak, speak! You are all resolved rather to die than to famish?")
        tokenizer = train_wordpiece(words, 500)
        assert tokenizer.decode(tokenizer.encode(words)) == words
