import onnx

from pipeline.export.operators import ALLOWED, operator_defects
from tests.unit.export import sabotage


def test_an_exported_model_may_go_anywhere_and_a_rare_operator_nowhere(model: onnx.ModelProto) -> None:
    assert list(operator_defects(model)) == []
    sabotage.use_a_rare_operator(model)
    sabotage.use_a_private_operator(model)
    assert list(operator_defects(model)) == [
        "it uses operators of com.acme, which other runtimes lack",
        "it uses Det, which are not among the operators that every runtime is known to execute",
    ]


def test_every_listed_operator_is_one_of_onnx_in_the_opset_of_exports() -> None:
    for name in ALLOWED:
        assert onnx.defs.get_schema(name, 20).since_version <= 20
