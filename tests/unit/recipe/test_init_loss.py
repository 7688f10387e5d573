import math

import pytest
from torch import nn

from pipeline.recipe.init_loss import check_init_loss
from pipeline.recipe.verdict import Subject
from tests.unit.recipe.conftest import ChangeNetwork


def test_a_fresh_network_that_guesses_is_green(subject: Subject) -> None:
    verdict = check_init_loss(subject)
    assert (verdict.check, verdict.verdict) == ("init_loss", "green")
    assert verdict.value == pytest.approx(math.log(3), rel=0.1)  # the check's own tolerance
    assert verdict.expected == "1.0986 +- 10%"


def test_an_absurd_last_layer_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    def enlarge(network: nn.Sequential) -> None:
        nn.init.normal_(network.get_parameter("classifier.2.weight"), std=5.0)

    change_network(enlarge)
    verdict = check_init_loss(subject)
    assert verdict.verdict == "red"
    assert isinstance(verdict.value, float)
    assert verdict.value > 1.1 * math.log(3)
    assert f"a fresh network's loss is {verdict.value:.4f}, not 1.0986" in verdict.why
    assert "its last layer is initialised too large" in verdict.why


def test_a_loss_that_is_no_number_is_red(subject: Subject, change_network: ChangeNetwork) -> None:
    def spoil(network: nn.Sequential) -> None:
        nn.init.constant_(network.get_parameter("classifier.2.weight"), math.nan)

    change_network(spoil)
    assert check_init_loss(subject).verdict == "red"
