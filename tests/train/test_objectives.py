"""The table of objectives, and what a config may name of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from lit_lora.train.config import TrainConfig
from lit_lora.train.objectives import OBJECTIVES, metric_names, objective_class


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_made_without_settings_and_says_what_it_measures(name):
    objective = objective_class(name)()
    assert objective.unit
    assert set(objective.metrics) <= set(metric_names())
    for metric in objective.metrics:
        assert TrainConfig(best_metric=metric).best_metric == metric


def test_a_metric_that_no_objective_measures_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match=r"unknown metric 'acuracy' \(did you mean 'accuracy'\?\), known: loss, "):
        TrainConfig(best_metric="acuracy")
    schema = TrainConfig.model_json_schema()["properties"]["best_metric"]
    assert schema["enum"] == metric_names()
    assert schema["default"] == "loss"


def test_reading_the_tables_imports_nothing_heavy():
    code = "import sys, lit_lora.train.objectives, lit_lora.train.optim; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
