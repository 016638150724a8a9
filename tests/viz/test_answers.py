"""Dose curves, probes and edges have pictures with the numbers that they hold."""

from __future__ import annotations

import pytest
import torch

from tests.viz.reading import read
from tracekit import LanguageModel, Picture, show
from tracekit.analysis import (
    dose_curve,
    edge_attribution,
    logit_difference,
    probe,
    steering_vector,
)

CITY = "The {} is in the city of"
CLEAN, OTHER = CITY.format("Eiffel Tower"), CITY.format("Willis Tower")


def numbers_of(picture: Picture) -> list[float]:
    cells = read(picture.html).all("td")
    return [float(cell["title"].split("; ")[0].rpartition(": ")[2]) for cell in cells]


def test_a_dose_curve_shows_the_metric_and_what_it_costs(model: LanguageModel) -> None:
    vectors = steering_vector(model, CLEAN, OTHER, layer=[0, 1])
    metric = logit_difference(model, "Paris", "Chicago")
    curve = dose_curve(model, vectors, OTHER, metric, [0, 1])
    both = torch.cat([curve.metric.values.flatten(), curve.divergence.values.flatten()])
    assert numbers_of(show(curve)) == pytest.approx(both.tolist(), abs=1e-6)
    assert "KL from the unsteered" in show(curve).text


def test_probes_are_shown_beside_their_control(model: LanguageModel) -> None:
    words = ["great", "lovely", "awful", "horrible"]
    texts = [f"The movie was {word}. I" for word in words]
    found = probe(model, texts, ["good"] * 2 + ["bad"] * 2, positions=[-1])
    both = torch.cat([found.accuracy.values.flatten(), found.control.values.flatten()])
    assert numbers_of(show(found)) == pytest.approx(both.tolist())
    assert "bad, good; chance is 50%" in show(found).text


def test_edges_are_a_table_the_largest_first(model: LanguageModel) -> None:
    edges = edge_attribution(model, CLEAN, OTHER, logit_difference(model, "Paris", "Chicago"))
    rows = [[cell.text for cell in row.all("td")] for row in read(show(edges).html).all("tr")[1:]]
    assert [row[:2] for row in rows] == [list(edge[:2]) for edge in edges.top()]
    assert len(read(show(edges.circuit(4)).html).all("tr")) == 1 + 4
