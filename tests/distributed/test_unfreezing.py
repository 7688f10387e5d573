"""Parts that begin to train in a later epoch are reduced over the ranks as all others are."""

from pathlib import Path

from tests.distributed.test_ranks import SETTINGS, run_ranks

UNFREEZING = ["--data.steps_per_epoch=3", "--model.freeze=[features]", "--model.unfreeze={features.0: 1}"]


def test_ranks_keep_equal_weights_when_a_part_begins_to_train(workspace: Path) -> None:
    frozen, thawed = (
        run_ranks(workspace, f"unfreezing-{epochs}", 2, settings=[*SETTINGS, *UNFREEZING, f"--trainer.max_epochs={epochs}"])
        for epochs in (1, 2)
    )
    for ranks in (frozen, thawed):
        assert ranks[0]["weights"] == ranks[1]["weights"]
    names = frozen[0]["weights"].keys()
    moved = {name for name in names if thawed[0]["weights"][name] != frozen[0]["weights"][name]}
    assert moved == {"features.0.weight", "classifier.2.weight", "classifier.2.bias"}
