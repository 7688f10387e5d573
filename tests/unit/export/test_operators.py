import onnx
import pytest

from pipeline.export.operators import ALLOWED, Target, operator_defects
from tests.unit.export import sabotage


@pytest.mark.parametrize("target", ALLOWED)
def test_an_exported_model_may_go_anywhere_and_a_rare_operator_nowhere(model: onnx.ModelProto, target: Target) -> None:
    assert list(operator_defects(model, target)) == []
    sabotage.use_a_rare_operator(model)
    sabotage.use_a_private_operator(model)
    assert list(operator_defects(model, target)) == [
        "it uses operators of com.acme, which other runtimes lack",
        f"it uses Det, which are not among the operators that {target} is known to execute",
    ]


@pytest.mark.parametrize("target", ALLOWED)
def test_every_listed_operator_is_one_of_onnx_in_the_opset_of_exports(target: Target) -> None:
    for name in ALLOWED[target]:
        assert onnx.defs.get_schema(name, 20).since_version <= 20
