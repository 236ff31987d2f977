"""The exported graphs of GRU translators against PyTorch, and searches over them; 20 seconds, most of it exporting."""

import numpy as np
import pytest
import torch

from services.nlp.serving.decoding import DecodingBatch
from services.nlp.serving.search import NEVER, SearchSettings
from services.nlp.tokenizers.special import EOS, PAD, SPECIAL_PIECES
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.tokenizers.words import WordTokenizer
from services.nlp.training.decode import greedy
from services.nlp.training.gru_graphs import (
    GruEncoderGraph,
    GruStepGraph,
    export_gru_encoder,
    export_gru_step,
    gru_step_examples,
)
from services.nlp.training.models.gru_translator import GruConfig, GruTranslator
from services.nlp.training.offline import OnnxTranslator

WIDTH, SOURCE, TARGET = 16, 40, 50


class Made:
    """A network that says something else for every source, its graphs, and a translator over them."""

    def __init__(self, attention, folder):
        torch.manual_seed(0)
        self.model = GruTranslator(GruConfig(SOURCE, TARGET, WIDTH, attention)).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.mul_(3).add_(0.1 * torch.randn_like(weight))
            self.model.output.bias[list(NEVER)] = -1e4  # what serving never writes
        export_gru_encoder(self.model, folder / "encoder.onnx")
        export_gru_step(self.model, folder / "step.onnx", max_bytes=10**9)
        vocabularies = Vocabularies(
            *(WordTokenizer([*SPECIAL_PIECES, *map(str, range(4, size))]) for size in (SOURCE, TARGET))
        )
        self.translator = OnnxTranslator.open(folder / "encoder.onnx", folder / "step.onnx", vocabularies)
        rng = np.random.default_rng(0)
        lengths = (1, 2, 3, 7, 12, 9, 4, 5) * 3
        self.sentences = [[str(word) for word in rng.integers(4, SOURCE, length)] for length in lengths]


@pytest.fixture(scope="module", params=["none", "additive"])
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def feeds_of(session, examples):
    token, state, source = examples
    inputs = (token, state, *source)
    return {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 1), (4, 9)])
@torch.inference_mode()
def test_encoder_is_pytorchs(made, rows, length):
    torch.manual_seed(0)
    source = torch.randint(4, SOURCE, (rows, length))
    source[-1, length // 2 + 1 :] = PAD
    expected, session = GruEncoderGraph(made.model)(source), made.translator.encoder
    found = session.run(None, {"source": source.numpy()})
    names = [output.name for output in session.get_outputs()]
    assert names == ["state", "cross_states", "cross_keys"][: len(expected)]
    assert len(expected) == (3 if made.model.attention else 1)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other.numpy(), rtol=0, atol=2e-5)
    memory = made.model.read(source)
    np.testing.assert_allclose(found[0], memory.state.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 1), (4, 9)])
@torch.inference_mode()
def test_step_is_pytorchs(made, rows, length):
    torch.manual_seed(0)
    examples, session = gru_step_examples(made.model, rows=rows, source=length), made.translator.step
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds_of(session, examples)), strict=True))
    for name, other in zip(names, GruStepGraph(made.model)(*examples), strict=True):
        assert found[name].shape == other.shape
        np.testing.assert_allclose(found[name], other.numpy(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(np.exp(found["log_probabilities"]).sum(-1), 1, atol=1e-5)
    if made.model.attention:
        np.testing.assert_allclose(found["attention"].sum(-1), 1, atol=1e-5)


def test_hidden_positions_change_nothing_and_rows_are_independent(made):
    torch.manual_seed(0)
    session = made.translator.step
    token, state, source = gru_step_examples(made.model, rows=4, source=7)
    together = session.run(None, feeds_of(session, (token, state, source)))
    for row in range(4):
        kept = slice(row, row + 1)
        cut = [tensor[kept] for tensor in source]
        if cut:
            length = int(cut[0])
            cut[1:] = [torch.nn.functional.pad(tensor[:, :, :length], (0, 0, 0, 3), value=50.0) for tensor in cut[1:]]
        alone = dict(
            zip(
                [output.name for output in session.get_outputs()],
                session.run(None, feeds_of(session, (token[kept], state[kept], cut))),
                strict=True,
            )
        )
        np.testing.assert_allclose(alone["log_probabilities"][0], together[0][row], rtol=0, atol=5e-5)
        np.testing.assert_allclose(alone["new_state"][0], together[-1][row], rtol=0, atol=2e-5)


def test_beam_1_is_greedy_decoding_in_pytorch(made):
    english = made.translator.vocabularies.english
    expected = greedy(made.model, [[*english.encode(words), EOS] for words in made.sentences], 15)
    assert len(set(map(tuple, expected))) > 10
    found = made.translator.translate(made.sentences, SearchSettings(beam=1, max_tokens=15))
    assert [one.tokens for one in found] == expected


@pytest.mark.parametrize("beam", [1, 4])
def test_translating_together_is_translating_alone(made, beam):
    settings = SearchSettings(beam=beam, max_tokens=15)
    together = made.translator.translate(made.sentences, settings)
    for words, found in zip(made.sentences, together, strict=True):
        (alone,) = made.translator.translate([words], settings)
        assert (alone.tokens, alone.finished) == (found.tokens, found.finished)
        assert alone.score == pytest.approx(found.score, abs=1e-4)


def test_wider_beams_score_no_worse_on_the_whole(made):
    """Of one sentence a wider beam may lose; normalised alike, of many it does not."""
    totals = []
    for beam in (1, 3, 8):
        found = made.translator.translate(made.sentences, SearchSettings(beam=beam, max_tokens=15))
        totals.append(sum(one.score for one in found))
    assert totals == sorted(totals)


def test_sentences_join_and_leave(made):
    """One step apart, with other beams, against each alone."""
    translator = made.translator
    names = [output.name for output in translator.step.get_outputs()]
    batch, joined = DecodingBatch(translator._inputs()), []

    def step():
        batch.settle(dict(zip(names, translator.step.run(names, batch.feeds()), strict=True)))

    for number, words in enumerate(made.sentences[:12]):
        joined.append(translator._encode(words, SearchSettings(beam=1 + number % 5, max_tokens=12)))
        batch.add(joined[-1])
        step()
    while batch.running:
        step()
    for number, (words, one) in enumerate(zip(made.sentences, joined, strict=False)):
        (alone,) = translator.translate([words], SearchSettings(beam=1 + number % 5, max_tokens=12))
        assert one.search.best(1)[0].tokens == alone.tokens
