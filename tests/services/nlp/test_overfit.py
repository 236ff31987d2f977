"""The gate of learning by heart, on made-up pairs; on the real ones it is a part of `make verify`. 3 seconds."""

import pytest

from services.nlp.training import overfit


@pytest.fixture
def made_up(toy_corpus, monkeypatch):
    monkeypatch.setattr(overfit, "divide", lambda division: (toy_corpus.take(range(64)), None))


def test_it_learns_by_heart(made_up, capsys):
    with pytest.raises(SystemExit) as ended:
        overfit.main(overfit.OverfitConfig(pairs=64, epochs=20))
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("learns") == len(overfit.NETWORKS)


def test_a_network_that_does_not_learn_fails_it(made_up, monkeypatch, capsys):
    frozen = {title: (sizes, 0.0) for title, (sizes, _) in overfit.NETWORKS.items()}
    monkeypatch.setattr(overfit, "NETWORKS", frozen)
    with pytest.raises(SystemExit) as ended:
        overfit.main(overfit.OverfitConfig(pairs=64, epochs=1))
    assert ended.value.code == 1
    assert "not below 1 in 120 s" in capsys.readouterr().out


def test_one_that_takes_too_long_fails_it():
    assert overfit.Learnt("", 0.99, 119.0).good
    assert not overfit.Learnt("", 0.99, 120.0).good
    assert not overfit.Learnt("", 1.0, 5.0).good
