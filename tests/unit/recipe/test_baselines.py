import dataclasses

import pytest

from pipeline.files import write_json
from pipeline.recipe.baselines import BASELINES, compare_with_baselines, measure_baselines
from pipeline.recipe.verdict import Subject


def test_colours_are_told_by_their_pixels_and_a_third_by_the_largest_class(subject: Subject) -> None:
    measured = measure_baselines(subject)
    assert measured["accuracy"]["majority"] == {"val": 4 / 12, "test": 4 / 12}
    assert measured["accuracy"]["logistic_regression"] == {"val": 1.0, "test": 1.0}
    assert (measured["num_train"], measured["num_samples"]) == (36, {"val": 12, "test": 12})


@pytest.mark.parametrize(("accuracy", "beaten"), [(0.7, True), (0.6, False), (0.5, False)])
def test_a_network_must_beat_every_baseline_of_its_split(subject: Subject, accuracy: float, beaten: bool) -> None:
    run_dir, digest = subject.config.run_dir, subject.manifest.digest
    assert compare_with_baselines(run_dir, digest, "test", accuracy) is None, "the checks have not run"
    found = {"majority": {"val": 0.9, "test": 0.3}, "logistic_regression": {"val": 0.9, "test": 0.6}}
    write_json(run_dir / BASELINES, {"data_digest": digest, "accuracy": found})
    compared = compare_with_baselines(run_dir, digest, "test", accuracy)
    assert compared == {"majority": 0.3, "logistic_regression": 0.6, "beaten": beaten}
    assert compare_with_baselines(run_dir, "other data", "test", accuracy) is None


def test_streamed_shards_have_no_baselines_and_say_why(subject: Subject) -> None:
    streamed = dataclasses.replace(subject.manifest, streams={"train": ["train.tar"]})
    measured = measure_baselines(dataclasses.replace(subject, manifest=streamed))
    assert measured["accuracy"] == {}
    assert measured["why_none"] == "streamed shards cannot be sampled"
