import copy
import json
from pathlib import Path

import onnx
import pytest

from pipeline.errors import GateError
from pipeline.export.lint import require_clean
from pipeline.preprocess import PreprocessSpec
from tests.unit.export import sabotage
from tests.unit.export.sabotage import Change


def test_the_true_model_is_clean(exported_model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    require_clean(exported_model, tiny_spec, 20)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sabotage.add_training_dropout, r"node noise \(Dropout\) belongs to training"),
        (sabotage.hide_a_dropout_in_a_branch, r"node noise \(Dropout\) belongs to training"),
        (sabotage.train_the_norm, "belongs to training"),
        (sabotage.train_in_a_function, r"node norm \(BatchNormalization\) belongs to training"),
        (sabotage.draw_noise, r"node noise \(RandomNormalLike\) draws random numbers"),
        (sabotage.cut_a_wire, "it is not valid ONNX"),
        (sabotage.rename_the_input, r"its input is \[\('x'"),
        (sabotage.rename_an_output, r"its outputs are .*'p'"),
        (sabotage.freeze_the_batch, "the batch axis of `image` is frozen at 2"),
        (sabotage.freeze_the_batch_of_an_output, "the batch axis of `logits` is frozen at 2"),
        (sabotage.leave_the_batch_unnamed, "`image` has no named batch axis"),
        (sabotage.keep_weights_elsewhere, "it keeps weights in another file"),
        (sabotage.keep_a_constant_elsewhere, r"it keeps weights in another file \(c\)"),
        (sabotage.keep_a_constant_of_a_branch_elsewhere, r"it keeps weights in another file \(c\)"),
        (sabotage.keep_sparse_weights_elsewhere, r"it keeps weights in another file \(sparse\)"),
        (sabotage.use_a_private_operator, "it uses operators of com.acme, which other runtimes lack"),
        (sabotage.use_a_rare_operator, "it uses Det, which are not among the operators that every runtime is known to execute"),
        (sabotage.leak_in_a_note, "it holds the path .*/pipeline/models of the machine that built it"),
        (sabotage.leak_in_a_name, "it holds the path /home/somebody/shardline/network/conv1 of the machine"),
        (sabotage.leak_in_a_nodes_metadata, r"it holds the path models/network\.py of the machine"),
        (sabotage.leak_in_the_metadata, r"it holds the path C:\\Users\\somebody\\network of the machine"),
        (sabotage.leak_a_folder_of_data, "it holds the path /mnt/patients/2026/scans of the machine"),
        (sabotage.leak_a_password, "it holds an address with a password"),
        (sabotage.ask_for_another_domain, "it asks for operators of com.acme"),
        (sabotage.bring_a_function, r"it has functions of its own \(Relu\)"),
        (sabotage.leak_in_an_attribute, r"it holds the path /home/somebody/shardline/\.venv of the machine"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_breaks_the_contract_is_refused(
    model: onnx.ModelProto, tiny_spec: PreprocessSpec, change: Change, reason: str
) -> None:
    change(model)
    with pytest.raises(GateError, match=f"the exported graph is refused: .*{reason}") as refusal:
        require_clean(model, tiny_spec, 20)
    assert refusal.value.exit_code == 3


def test_a_network_exported_in_training_mode_is_refused(
    model: onnx.ModelProto, trained_graph: onnx.GraphProto, tiny_spec: PreprocessSpec
) -> None:
    model.graph.CopyFrom(trained_graph)
    with pytest.raises(GateError, match=r"\(Dropout\) belongs to training"):
        require_clean(model, tiny_spec, 20)


def test_another_opset_than_the_one_asked_for_is_refused(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    with pytest.raises(GateError, match="its opset is 20, not 21"):
        require_clean(model, tiny_spec, 21)


def test_the_bytes_of_a_weight_are_not_taken_for_a_path(
    model: onnx.ModelProto, tiny_spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder as short as a container's /w: any file of some megabytes has these two bytes somewhere.
    monkeypatch.setattr(Path, "cwd", lambda: Path("/w"))
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = weight.raw_data[:8] + b"/w.B" + weight.raw_data[12:]
    require_clean(model, tiny_spec, 20)


def test_a_class_may_be_called_what_looks_like_a_path(model: onnx.ModelProto, tiny_spec: PreprocessSpec) -> None:
    for name in ("/home/cat", "setup.py"):
        named = copy.deepcopy(model)
        sabotage.set_metadata(named, "class_names", json.dumps([name, "green", "red"]))
        require_clean(named, tiny_spec, 20)
