"""Pictures: what a reader of the SVG finds in it, by the figures that it was drawn from."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from usagi.nlp.v1 import nlp_service_pb2 as pb

from services.nlp.picture import COLUMNS, draw_probabilities, ground
from services.nlp.training import draw_gpt
from services.nlp.training.tasks import Permutations

SVG = "{http://www.w3.org/2000/svg}"


def scored(*tokens):
    return pb.ScoreTextResponse(
        tokens=[pb.ScoredToken(text=text, log_probability=value) for text, value in tokens],
        log_probability=sum(value for _, value in tokens),
        perplexity=2.5,
    )


class TestProbabilities:
    def test_every_character_is_shown_on_its_tokens_colour(self):
        drawn = ET.fromstring(draw_probabilities(scored(("a", 0), ("<b", -0.1), ("漢", -9), ("\x01", -2), ("&", -2))))
        texts = [element.text or "" for element in drawn.iter(f"{SVG}text")][1:]
        assert texts == ["a", "<", "b", "漢", "", "&"]
        grounds = [element.get("fill") for element in drawn.iter(f"{SVG}rect")][1:]
        assert grounds[1] == grounds[2] == "rgb({},{},{})".format(*ground(-0.1))
        assert grounds[3] == "rgb({},{},{})".format(*ground(-9))
        titles = [element.text for element in drawn.iter(f"{SVG}title")]
        assert titles[1] == titles[2] == "'<b' -0.10"
        assert "2.5" in next(drawn.iter(f"{SVG}text")).text

    def test_certain_is_green_and_improbable_red(self):
        certain, middling, improbable = ground(0), ground(-2), ground(-50)
        assert certain[1] > certain[0]
        assert improbable[0] > improbable[1]
        assert min(middling[:2]) > 200
        assert all(0 <= part <= 255 for colour in (certain, middling, improbable) for part in colour)

    @pytest.mark.parametrize(
        ("text", "rows"), [("a" * COLUMNS, 1), ("a" * (COLUMNS + 1), 2), ("漢" * COLUMNS, 2), ("a\nb\n", 2)]
    )
    def test_rows_end_at_their_width_and_at_line_feeds(self, text, rows):
        drawn = draw_probabilities(scored(*((character, -1) for character in text)))
        found = {int(y) for y in re.findall(r"<rect x='\d+' y='(\d+)'", drawn)}
        assert len(found) == rows


def test_losses_and_shots_are_drawn_from_the_runs(tmp_path):
    runs = tmp_path / "runs"
    for name in ("soseki-gpt", "fewshot-gpt"):
        (runs / name / "seed0").mkdir(parents=True)
    log = [{"epoch": epoch, "train_loss": 4 - epoch, "val_loss": 4.5 - epoch, "wall_seconds": 1} for epoch in range(3)]
    (runs / "soseki-gpt/seed0/metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    network = {"network": {"layers": 4, "width": 128}, "baselines": {"uniform": 7.9, "bigram": 4.21}}
    (runs / "soseki-gpt/seed0/result.json").write_text(json.dumps(network))
    measures = {f"accuracy_{shots}_shots": 0.5 for shots in Permutations.shots}
    (runs / "fewshot-gpt/seed0/result.json").write_text(json.dumps({"measures": measures}))
    pictures = []
    for out in (tmp_path / "one", tmp_path / "other"):
        draw_gpt.main(draw_gpt.DrawGptConfig(runs=runs, out=out))
        pictures.append({path.name: path.read_text() for path in sorted(out.iterdir())})
    assert pictures[0] == pictures[1], "the same bytes each time"
    assert list(pictures[0]) == ["nlp_loss_soseki.svg", "nlp_shots.svg"]
    assert "uniform 7.90" in pictures[0]["nlp_loss_soseki.svg"]
    assert "chance 0.167" in pictures[0]["nlp_shots.svg"]
