"""The study of the report's mistakes, on the toy translator; 10 seconds, most of it an export."""

import pytest
import torch

from services.nlp.tokenizers.special import BOS, EOS
from services.nlp.training import study_translation
from services.nlp.training.study_translation import Shifted, StudyConfig
from shared.errors import ConfigurationError


@pytest.fixture
def studied(chain, toy_corpus, monkeypatch):
    monkeypatch.setattr(study_translation, "RUNS", {"toy": "Toy", study_translation.AS_REPORTED: "As reported"})
    monkeypatch.setattr(study_translation, "load_pairs", lambda part: toy_corpus.take(range(18)))
    monkeypatch.setattr(study_translation, "BEAMS", (1, 3))
    monkeypatch.setattr(study_translation, "PENALTIES", (0.6,))
    return chain.run.parents[1]


def test_it_writes_a_page_and_a_picture(studied, chain, tmp_path):
    page = tmp_path / "study.md"
    study_translation.main(StudyConfig(runs=studied, page=page))
    text = page.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| Toy")]
    measures, searched = rows
    assert measures[:2] == ["Toy", "0"]
    words, ids, cut, shifted, forced = map(float, measures[2:])
    assert words == pytest.approx(float(searched[1]), abs=0.01)  # greedy over the graphs is greedy in PyTorch
    assert 50 < words <= ids <= 100
    assert 0 < shifted <= ids  # sentences of the same length are not hurt
    assert 0 < max(cut, forced) <= 100
    assert f"- Toy: `{chain.result['command']}`" in text
    assert (tmp_path / "pictures" / "translation_study.svg").read_text(encoding="utf-8").count("BLEU") > 0
    before = (page.read_bytes(), (tmp_path / "pictures" / "translation_study.svg").read_bytes())
    study_translation.study(StudyConfig(runs=studied, page=page, beams=False))
    assert before[1] == (tmp_path / "pictures" / "translation_study.svg").read_bytes()
    assert "## Beams" in text
    assert "## Beams" not in page.read_text(encoding="utf-8")


@torch.inference_mode()
def test_shifted_positions_are_one_off(chain):
    source, token, model = torch.tensor([[5, 6, 7, EOS]]), torch.tensor([BOS]), chain.model
    right, wrong = model.start(source), Shifted(model).start(source)
    assert (right.position, wrong.position) == (0, 1)
    assert (Shifted(model).proceed(token, wrong)[0] - model.proceed(token, right)[0]).abs().max() > 1e-3
    assert torch.equal(Shifted(model).proceed(token, wrong)[0], model.proceed(token, model.start(source, 1))[0])


def test_nothing_to_study(tmp_path):
    with pytest.raises(ConfigurationError, match="train first"):
        study_translation.study(StudyConfig(runs=tmp_path))
