"""Byte-pair encoding against brute force, whole words against the report, and both as files."""

import json
import random
import time
from collections import Counter
from itertools import pairwise

import pytest

from services.nlp.tokenizers.bpe import LONGEST_WORD, WORD_BEGIN, BytePairTokenizer, train_bpe
from services.nlp.tokenizers.characters import collect_characters
from services.nlp.tokenizers.special import BOS, EOS, PAD, SPECIAL_PIECES, UNK
from services.nlp.tokenizers.text_bpe import TextBytePairTokenizer, chunks, train_text_bpe
from services.nlp.tokenizers.texts import read_text_tokenizer
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.tokenizers.words import WordTokenizer, count_words
from services.nlp.training.data import divide, load_pairs
from shared.errors import ConfigurationError

TEXT = [
    "low",
    "low",
    "low",
    "low",
    "low",
    "lower",
    "lower",
    "newest",
    "newest",
    "newest",
    "newest",
    "newest",
    "newest",
    "widest",
    "widest",
    "widest",
]


def symbols(word):
    return [WORD_BEGIN + word[0], *word[1:]]


def joined(parts, pair):
    """All occurrences of a pair made one, from the left."""
    made, at = [], 0
    while at < len(parts):
        if tuple(parts[at : at + 2]) == pair:
            made.append(parts[at] + parts[at + 1])
            at += 2
        else:
            made.append(parts[at])
            at += 1
    return made


def brute_force_training(words, merges):
    """Counts everything again after every merge; returns the merges and how each word is spelled in the end."""
    spelled = [symbols(word) for word in words]
    learnt = []
    while len(learnt) < merges:
        pairs = Counter(pair for parts in spelled for pair in pairwise(parts))
        if not pairs or max(pairs.values()) < 2:
            break
        learnt.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        spelled = [joined(parts, learnt[-1]) for parts in spelled]
    return learnt, dict(zip(words, map(tuple, spelled), strict=True))


def brute_force_split(word, merges):
    parts = symbols(word)
    for pair in merges:
        parts = joined(parts, pair)
    return tuple(parts)


def joined_pair(pair):
    return tuple(map(" ".join, pair))


def random_words(seed, count=120, letters="abc", longest=9):
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def fluent():
    return train_bpe(TEXT + random_words(5, 1000, "lowerns"), 300)


class TestBytePairs:
    def test_by_hand(self):
        bpe = train_bpe(TEXT, 3)  # low 5 times, lower 2, newest 6, widest 3
        assert bpe.merges == (("e", "s"), ("es", "t"), ("o", "w"))  # 9, 9, 7; `s t` and `▁l o` occur as often
        assert bpe.split("lowest") == (WORD_BEGIN + "l", "ow", "est")
        assert bpe.pieces[:4] == SPECIAL_PIECES
        assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)

    @pytest.mark.parametrize("seed", range(12))
    def test_training_is_that_of_brute_force(self, seed):
        words = random_words(
            seed, letters="ab" if seed % 2 else "abcde"
        )  # few letters: many ties, and runs such as aaaa
        merges, spelled = brute_force_training(words, 60)
        bpe = train_bpe(words, 60)
        assert list(bpe.merges) == merges
        assert {word: bpe.split(word) for word in spelled} == spelled

    @pytest.mark.parametrize("seed", range(12))
    def test_encoding_applies_the_merges_in_order(self, seed):
        bpe = train_bpe(random_words(seed), 60)
        for word in random_words(seed + 1000, count=200, longest=30):
            pieces = brute_force_split(word, bpe.merges)
            assert bpe.split(word) == pieces
            assert bpe.encode([word]) == [bpe.pieces.index(piece) for piece in pieces]

    def test_the_order_of_the_words_does_not_matter(self):
        words = random_words(0)
        assert train_bpe(sorted(words), 40).to_json() == train_bpe(sorted(words, reverse=True), 40).to_json()

    def test_merges_end_when_no_pair_occurs_twice(self):
        bpe = train_bpe(["ab", "cd", "ab"], 1000)
        assert bpe.merges == ((WORD_BEGIN + "a", "b"),)
        assert bpe.pieces == (*SPECIAL_PIECES, "b", WORD_BEGIN + "a", WORD_BEGIN + "ab")

    def test_a_merge_never_crosses_words(self):
        bpe = train_bpe(["a", "b"] * 50, 10)
        assert bpe.merges == ()
        assert bpe.decode(bpe.encode(["a", "b", "a"])) == ["a", "b", "a"]

    def test_unknown_characters(self):
        bpe = train_bpe(TEXT, 10)
        ids = bpe.encode(["low", "lo🙂w", "日本"])
        assert ids[: len(bpe.encode(["low"]))] == bpe.encode(["low"])
        assert ids.count(UNK) == 3
        assert bpe.split("日本") == (WORD_BEGIN + "日", "本")
        assert bpe.encode([""]) == []
        assert bpe.decode([UNK]) == ["<unk>"]

    def test_rare_characters_are_unknown(self):
        bpe = train_bpe(["aa", "aa", "az"], 5)
        assert bpe.encode(["az"])[-1] == UNK

    def test_decoding_leaves_special_ids_out(self):
        bpe = train_bpe(TEXT, 50)
        assert bpe.decode([BOS, *bpe.encode(["low", "newest"]), EOS, PAD]) == ["low", "newest"]

    @pytest.mark.parametrize(
        "word", ["a" * 2000, "newest" * 333, "low🙂" * 500, "".join(random_words(3, 400, "lowerns"))]
    )
    def test_long_words_take_no_time_and_lose_nothing(self, fluent, word):
        started = time.process_time()
        pieces = fluent.split(word * 3)
        assert time.process_time() - started < 0.5  # took 4.5 s when the work grew with the square of the length
        assert "".join(pieces) == WORD_BEGIN + word * 3

    def test_words_are_spelled_whole_up_to_the_limit(self):
        bpe = train_bpe(random_words(0), 60)
        word = "".join(random_words(1, 100))[:LONGEST_WORD]
        assert bpe.split(word) == brute_force_split(word, bpe.merges)
        assert bpe.split(word + "a") == (*brute_force_split(word, bpe.merges), "a")

    @pytest.mark.data
    def test_corpus_round_trip(self):
        pairs = load_pairs("dev")
        for sentences in (pairs.english, pairs.japanese):
            words = [word for sentence in sentences for word in sentence]
            bpe = train_bpe(words, 300, min_count=1)
            ids = bpe.encode(words)
            assert UNK not in ids
            assert bpe.decode(ids) == words
            for word in list(dict.fromkeys(words))[:500]:
                assert bpe.split(word) == brute_force_split(word, bpe.merges)


class TestWords:
    def test_by_hand(self):
        tokenizer = count_words(["a", "b", "a", "c", "b", "a", "d"])
        assert tokenizer.pieces == (*SPECIAL_PIECES, "a", "b")
        assert tokenizer.encode(["b", "c", "a"]) == [5, UNK, 4]
        assert tokenizer.decode([BOS, 5, UNK, 4, EOS, PAD]) == ["b", "<unk>", "a"]

    @pytest.mark.data
    def test_the_reports_division_and_vocabularies(self):
        training, held = divide("report")
        assert (len(training), len(held)) == (40_000, 10_000)
        assert " ".join(training.english[0]) == "where shall we eat tonight ?"
        assert " ".join(held.english[0]) == "you may extend your stay in tokyo ."
        sizes = [len(count_words(w for s in side for w in s)) for side in (training.english, training.japanese)]
        assert sizes == [3725, 4405]  # the four special ones included
        dev = load_pairs("dev")
        assert len(dev) == 500
        assert " ".join(dev.english[0]) == "show your own business ."
        assert " ".join(dev.japanese[0]) == "自分 の 事 を しろ 。"

    @pytest.mark.data
    def test_no_division_trains_on_what_it_validates(self):
        whole = load_pairs("train")
        for division, held_back in (("report", 10_000), ("most", 500)):
            training, held = divide(division)
            assert len(held) == held_back
            divided = Counter(map(joined_pair, zip(training.english, training.japanese, strict=True)))
            divided += Counter(map(joined_pair, zip(held.english, held.japanese, strict=True)))
            assert divided == Counter(map(joined_pair, zip(whole.english, whole.japanese, strict=True)))


class TestFiles:
    @pytest.mark.parametrize(
        "tokenizer", [train_bpe([*TEXT, "日本", "日本"], 20), count_words([*TEXT, "日本", "日本"])]
    )
    def test_json_round_trip(self, tokenizer):
        again = type(tokenizer).from_json(tokenizer.to_json())
        words = ["lowest", "日本", "🙂", "newer"]
        assert again.pieces == tokenizer.pieces
        assert again.encode(words) == tokenizer.encode(words)
        assert again.to_json() == tokenizer.to_json()
        assert "日本" in tokenizer.to_json()

    def test_both_kinds_in_one_file(self):
        both = Vocabularies(train_bpe(TEXT, 20), count_words(TEXT))
        again = Vocabularies.from_json(both.to_json())
        assert isinstance(again.english, BytePairTokenizer)
        assert isinstance(again.japanese, WordTokenizer)
        assert again.to_json() == both.to_json()

    @pytest.mark.parametrize("kind", [BytePairTokenizer, WordTokenizer, Vocabularies])
    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "null", "[]", "5", '"text"', "{}", '{"pieces": 5}', '{"pieces": ["a", "b"], "merges": []}'),
            '{"english": {"kind": "nope"}, "japanese": {}}',
            '{"english": 1, "japanese": null}',
            '{"pieces": null, "merges": null}',
        ],
    )
    def test_broken_files(self, kind, text):
        with pytest.raises(ConfigurationError, match="again"):
            kind.from_json(text)

    def test_broken_merges(self):
        text = json.loads(train_bpe(TEXT, 5).to_json())
        for merges in ([["a"]], [["a", "b", "c"]], 7, [1]):
            with pytest.raises(ConfigurationError):
                BytePairTokenizer.from_json(json.dumps(text | {"merges": merges}))


class TestTextPieces:
    """Byte-pair encoding of running text."""

    TEXT = "To be, or not to be:\nthat is  the question.\n\nROMEO:\n\tBut soft! 12 moons;  \n"

    @pytest.mark.parametrize("merges", [0, 5, 40, 1000])
    def test_round_trip_keeps_every_character(self, merges):
        tokenizer = train_text_bpe(self.TEXT, merges)
        pieces = tokenizer.split(self.TEXT)
        assert "".join(pieces) == self.TEXT == tokenizer.decode(tokenizer.encode(self.TEXT))
        assert [tokenizer.pieces[index] for index in tokenizer.encode(self.TEXT)] == pieces
        again = TextBytePairTokenizer.from_json(tokenizer.to_json())
        assert again.encode(self.TEXT) == tokenizer.encode(self.TEXT)

    @pytest.mark.parametrize("seed", range(20))
    def test_any_text_is_cut_into_chunks_without_loss(self, seed):
        rng = random.Random(seed)
        text = "".join(rng.choice("ab 1_,'\n\t\r 　猫é🙂") for _ in range(rng.randint(0, 300)))
        assert "".join(chunks(text)) == text
        assert "".join(train_text_bpe(self.TEXT, 20).split(text)) == text

    def test_words_take_the_space_before_them_and_merges_stay_inside(self):
        assert chunks("it is,  or\n\nnot") == ["it", " is", ",", " ", " or", "\n\n", "not"]
        tokenizer = train_text_bpe("a b " * 50, 100)
        assert set(tokenizer.split("a b a b ")) <= {"a", " a", " b", " "}

    def test_the_first_merge_is_the_most_frequent_pair(self):
        tokenizer = train_text_bpe("ab ab ab cd cd", 2)  # of `a`+`b` 3, ` `+`a` 2, `c`+`d` 2 and ` `+`c` 2
        assert tokenizer.merges[0] == ("a", "b")
        assert tokenizer.merges[1] == (" ", "ab"), "ties in the order of Unicode"

    def test_rare_characters_are_unknown_but_keep_their_place(self):
        tokenizer = train_text_bpe("aaaa bbbb aaaa bbbb xq", 50, min_count=2)
        assert tokenizer.encode("x") == [UNK]
        assert "".join(tokenizer.split("aaaa xq")) == "aaaa xq"
        assert not any("x" in piece or "q" in piece for piece in tokenizer.pieces[4:])

    def test_long_chunks_do_not_cost_the_square_of_their_length(self):
        tokenizer = train_text_bpe("ab" * 50, 20)
        started = time.perf_counter()
        assert "".join(tokenizer.split("ab" * 50_000)) == "ab" * 50_000
        assert time.perf_counter() - started < 5  # whole it would take hours

    @pytest.mark.parametrize("kind", ["characters", "pieces"])
    def test_a_file_says_what_kind_it_holds(self, kind):
        made = collect_characters(self.TEXT) if kind == "characters" else train_text_bpe(self.TEXT, 9)
        read = read_text_tokenizer(made.to_json())
        assert type(read) is type(made)
        assert read.split(self.TEXT) == made.split(self.TEXT)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "words", "pieces": []}', '{"kind": "text-bpe"}'])
    def test_another_file_is_refused(self, text):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_text_tokenizer(text)
