"""BLEU by hand, against sacreBLEU, and where it is zero."""

import math
import random

import pytest
import sacrebleu

from services.nlp.training.bleu import corpus_bleu

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "own", "tail", "."]


def theirs(candidates, references):
    return sacrebleu.corpus_bleu(
        [" ".join(words) for words in candidates],
        [[" ".join(words) for words in references]],
        tokenize="none",
        smooth_method="none",
        force=True,
    )


def test_by_hand():
    candidate, reference = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "is", "on", "the", "mat"]
    # the the cat on mat: 5 of 6; the-cat, on-the, the-mat: 3 of 5; on-the-mat: 1 of 4; no 4-gram of 3
    bleu = corpus_bleu([candidate], [reference])
    assert bleu.precisions == pytest.approx((500 / 6, 60, 25, 0))
    assert bleu.score == 0
    # the same sentence once more, right this time: 11 of 12, 8 of 10, 5 of 8, 3 of 6
    bleu = corpus_bleu([candidate, reference], [reference, reference])
    assert bleu.precisions == pytest.approx((1100 / 12, 80, 62.5, 50))
    assert bleu.score == pytest.approx(100 * (11 / 12 * 0.8 * 0.625 * 0.5) ** 0.25, abs=1e-12)
    assert (bleu.brevity_penalty, bleu.candidate_words, bleu.reference_words) == (1, 12, 12)


def test_matches_are_clipped():
    bleu = corpus_bleu([["the"] * 7], [["the", "cat", "is", "on", "the", "mat", "there"]])
    assert bleu.precisions[0] == pytest.approx(200 / 7)  # Papineni's own example: 2 of 7


def test_brevity_penalty():
    reference = WORDS[:10]
    for length in (4, 7, 9):
        bleu = corpus_bleu([reference[:length]], [reference])
        assert bleu.brevity_penalty == pytest.approx(math.exp(1 - 10 / length))
        assert bleu.score == pytest.approx(100 * math.exp(1 - 10 / length))
    assert corpus_bleu([reference], [reference]).brevity_penalty == 1
    longer = corpus_bleu([[*reference, "and"]], [reference])
    assert longer.brevity_penalty == 1
    assert longer.score == pytest.approx(100 * (10 / 11 * 9 / 10 * 8 / 9 * 7 / 8) ** 0.25)


@pytest.mark.parametrize("seed", range(40))
def test_random_corpora_against_sacrebleu(seed):
    rng = random.Random(seed)
    references = [rng.choices(WORDS, k=rng.randint(1, 14)) for _ in range(rng.randint(1, 25))]
    candidates = [list(reference) for reference in references]
    for candidate in candidates:
        for _ in range(rng.randint(0, 5)):
            if rng.random() < 0.5:
                candidate[rng.randrange(len(candidate))] = rng.choice(WORDS)
            elif rng.random() < 0.5 and len(candidate) > 1:
                del candidate[rng.randrange(len(candidate))]
            else:
                candidate.insert(rng.randint(0, len(candidate)), rng.choice(WORDS))
    ours, expected = corpus_bleu(candidates, references), theirs(candidates, references)
    assert ours.score == pytest.approx(expected.score, abs=1e-6)
    assert ours.brevity_penalty == pytest.approx(expected.bp, abs=1e-12)
    assert (ours.candidate_words, ours.reference_words) == (expected.sys_len, expected.ref_len)
    if expected.score:
        assert ours.precisions == pytest.approx(expected.precisions, abs=1e-6)


def test_unknown_words_never_match():
    unknown = ["<unk>"] * 8
    assert corpus_bleu([unknown], [unknown]).precisions == (0, 0, 0, 0)
    candidate = ["a", "<unk>", "b", "c", "d", "e", "f"]
    bleu = corpus_bleu([candidate], [candidate])
    # of 7, 6, 5 and 4 n-grams those without the unknown word
    assert bleu.precisions == pytest.approx((600 / 7, 400 / 6, 60, 50))
    assert bleu.score == pytest.approx(100 * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)


@pytest.mark.parametrize(
    ("candidates", "references"),
    [
        ([], []),
        ([[]], [WORDS]),
        ([[], []], [[], []]),
        ([WORDS], [["nothing", "in", "common", "here"]]),
        ([WORDS[:3]], [WORDS[:3]]),  # no 4-gram at all
        ([["a", "mat"]], [WORDS]),
        ([WORDS], [[]]),
    ],
)
def test_zero(candidates, references):
    assert corpus_bleu(candidates, references).score == 0
    if candidates and any(candidates):
        assert theirs(candidates, references).score == pytest.approx(0, abs=1e-9)


def test_an_empty_candidate_counts_against_its_reference():
    bleu = corpus_bleu([WORDS, []], [WORDS, WORDS])
    assert bleu.brevity_penalty == pytest.approx(math.exp(1 - 2))
    assert bleu.score == pytest.approx(100 * math.exp(-1))


def test_the_order_of_sentences_does_not_matter_but_their_pairing_does():
    first, second = WORDS[:6], WORDS[6:]
    assert corpus_bleu([first, second], [first, second]).score == pytest.approx(100)
    assert corpus_bleu([second, first], [second, first]).score == pytest.approx(100)
    assert corpus_bleu([first, second], [second, first]).score == 0


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match="2 candidates for 1 references"):
        corpus_bleu([WORDS, WORDS], [WORDS])
