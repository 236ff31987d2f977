"""The exported graphs of a tiny translator against PyTorch, and what a step must not see."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from services.nlp.serving.decoding import DecodingBatch
from services.nlp.serving.search import SearchSettings
from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.training.decode import greedy
from services.nlp.training.export import VARIANTS
from services.nlp.training.graphs import EncoderGraph, StepGraph, cache_names, step_examples
from services.nlp.training.models.transformer import Transformer
from services.nlp.training.offline import OnnxTranslator
from services.nlp.training.translator_graphs import check_graphs
from shared.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options)


@pytest.fixture(scope="module")
def step(chain):
    return session(chain.graphs / "step.onnx")


def feeds_of(graph, examples):
    flat = (*examples[:3], *examples[3], *examples[4])
    return {entry.name: tensor.numpy() for entry, tensor in zip(graph.get_inputs(), flat, strict=True)}


def test_the_export_measured_its_own_parity(chain):
    assert 0 <= chain.parity <= 1e-4
    other = Transformer(chain.model.config).eval()
    with pytest.raises(ConfigurationError, match="differ from PyTorch"):
        check_graphs(other, chain.graphs / "encoder.onnx", chain.graphs / "step.onnx")


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 1), (4, 9)])
def test_encoder_is_pytorchs(chain, rows, length):
    model, folder = chain.model, chain.graphs
    source = torch.randint(4, model.config.source_vocabulary, (rows, length))
    source[-1, length // 2 + 1 :] = PAD
    graph = session(folder / "encoder.onnx")
    assert [output.name for output in graph.get_outputs()] == cache_names(2, "cross_")
    with torch.inference_mode():
        expected = EncoderGraph(model)(source)
    for own, other in zip(graph.run(None, {"source": source.numpy()}), expected, strict=True):
        assert own.shape == (rows, 4, length, 8)
        np.testing.assert_allclose(own, other.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "past", "source"), [(1, 1, 1), (1, 12, 3), (5, 1, 8), (5, 12, 3)])
def test_step_is_pytorchs(chain, step, rows, past, source):
    model = chain.model
    examples = step_examples(model, rows=rows, past=past, source=source)
    with torch.inference_mode():
        expected = StepGraph(model)(*examples)
    outputs = step.run(None, feeds_of(step, examples))
    assert [output.name for output in step.get_outputs()] == ["log_probabilities", "attention", *cache_names(2, "new_")]
    V = model.config.target_vocabulary
    assert [own.shape for own in outputs[:3]] == [(rows, V), (rows, 2, 4, source), (rows, 4, 8)]
    for own, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(own, other.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.exp(outputs[0]).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(outputs[1].sum(-1), 1, atol=1e-5)


def test_hidden_positions_change_nothing(chain, step):
    """Positions from `position` and `source_length` on: whatever lies there, however much of it."""
    model = chain.model
    examples = step_examples(model, rows=4, past=9, source=7)
    examples[1][:] = torch.tensor([0, 3, 8, 9])
    examples[2][:] = torch.tensor([1, 7, 4, 2])
    before = step.run(None, feeds_of(step, examples))
    for garbage, more in ((100.0, 0), (-100.0, 6), (0.0, 30)):
        spoilt = [*examples[:3], [], []]
        for number, lengths in ((3, examples[1]), (4, examples[2])):
            for tensor in examples[number]:
                larger = torch.nn.functional.pad(tensor, (0, 0, 0, more), value=garbage)
                hidden = torch.arange(larger.shape[2])[None] >= lengths[:, None]
                larger.masked_fill_(hidden[:, None, :, None], garbage)
                spoilt[number].append(larger)
        after = step.run(None, feeds_of(step, spoilt))
        attention = after[1]
        assert all((attention[row, ..., length:] == 0).all() for row, length in enumerate(examples[2]))
        after[1] = attention[..., :7]
        for own, other in zip(after, before, strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=2e-5)


def test_visible_positions_do_count(chain, step):
    model = chain.model
    examples = step_examples(model, rows=1, past=5, source=6)
    examples[1][:], examples[2][:] = 5, 6
    before = step.run(["log_probabilities"], feeds_of(step, examples))[0]
    for number, positions in ((3, range(5)), (4, range(6))):
        for position in positions:
            changed = [*examples[:3], *([tensor.clone() for tensor in group] for group in examples[3:])]
            changed[number][1][:, :, position] += 3
            after = step.run(["log_probabilities"], feeds_of(step, changed))[0]
            assert np.abs(after - before).max() > 1e-3


def test_a_rows_answer_does_not_depend_on_the_other_rows(chain, step):
    examples = step_examples(chain.model, rows=6, past=4, source=5)
    together = step.run(None, feeds_of(step, examples))
    for row in range(6):
        feeds = {name: array[row : row + 1] for name, array in feeds_of(step, examples).items()}
        for own, other in zip(step.run(None, feeds), together, strict=True):
            np.testing.assert_allclose(own[0], other[row], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def sentences(toy_corpus):
    """Right ones, and such as the model never saw: long, short, in disorder."""
    rng, words = np.random.default_rng(0), sorted({word for sentence in toy_corpus.english for word in sentence})
    odd = [[words[at] for at in rng.integers(0, len(words), length)] for length in (1, 2, 3, 7, 12, 9) * 3]
    return [word for pair in zip(toy_corpus.english, odd, strict=False) for word in pair]


def translator(chain, variant="fp32"):
    ending = "onnx" if variant == "fp32" else VARIANTS[variant]
    return OnnxTranslator.open(chain.graphs / f"encoder.{ending}", chain.graphs / f"step.{ending}", chain.vocabularies)


def test_greedy_search_over_the_graphs_is_greedy_decoding_in_pytorch(chain, sentences):
    sources = [[*chain.vocabularies.english.encode(words), EOS] for words in sentences]
    expected = greedy(chain.model, sources, 15)
    assert len(set(map(tuple, expected))) > 20
    found = translator(chain).translate(sentences, SearchSettings(beam=1, max_tokens=15))
    assert [one.tokens for one in found] == expected


@pytest.mark.parametrize("beam", [1, 4])
def test_translating_together_is_translating_alone(chain, sentences, beam):
    made, settings = translator(chain), SearchSettings(beam=beam, max_tokens=15)
    together = made.translate(sentences, settings)
    for words, found in zip(sentences[:12], together, strict=False):
        (alone,) = made.translate([words], settings)
        assert (alone.tokens, alone.finished) == (found.tokens, found.finished)
        assert alone.score == pytest.approx(found.score, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3, 8])
def test_a_hypothesis_log_probability_is_that_of_its_tokens_in_pytorch(chain, sentences, beam):
    for words in sentences[:6]:
        (found,) = translator(chain).translate([words], SearchSettings(beam=beam, max_tokens=15))
        ids = [*found.tokens, EOS][: len(found.tokens) + found.finished]
        source = torch.tensor([[*chain.vocabularies.english.encode(words), EOS]])
        with torch.inference_mode():
            log_p = chain.model((source, torch.tensor([[BOS, *ids][: len(ids)]])))[0].log_softmax(-1)
        assert found.log_probability == pytest.approx(log_p[torch.arange(len(ids)), ids].sum().item(), abs=1e-3)


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_smaller_variants_run_and_are_close(chain, sentences, variant):
    made = translator(chain, variant)
    for part in ("encoder", "step"):
        small, large = chain.graphs / f"{part}.{VARIANTS[variant]}", chain.graphs / f"{part}.onnx"
        assert small.stat().st_size < large.stat().st_size
    settings = SearchSettings(beam=3, max_tokens=10)
    exact = translator(chain).translate(sentences, settings)
    found = made.translate(sentences, settings)
    same = [
        one.tokens == other.tokens for one, other in zip(found[::2], exact[::2], strict=True)
    ]  # the right sentences
    assert sum(same) >= {"fp16": len(same), "int8": len(same) - 2}[variant]
    off = max(abs(one.score - other.score) for one, other in zip(found[::2], exact[::2], strict=True))
    assert 0 < off < {"fp16": 0.02, "int8": 0.5}[variant]


def test_sentences_join_and_leave_over_the_real_graph(chain, sentences, step):
    """One step apart, with other beams, against each alone."""
    made, names = translator(chain), [output.name for output in step.get_outputs()]
    batch, joined = DecodingBatch(made._inputs()), []
    for number, words in enumerate(sentences[:12]):
        joined.append(made._encode(words, SearchSettings(beam=1 + number % 5, max_tokens=12)))
        batch.add(joined[-1])
        batch.settle(dict(zip(names, step.run(names, batch.feeds()), strict=True)))
    while batch.running:
        batch.settle(dict(zip(names, step.run(names, batch.feeds()), strict=True)))
    for number, (words, one) in enumerate(zip(sentences, joined, strict=False)):
        (alone,) = made.translate([words], SearchSettings(beam=1 + number % 5, max_tokens=12))
        assert one.search.best(1)[0].tokens == alone.tokens
