"""Networks of every family have smaller forms that are valid and answer much as they do; how well is the gate's to say.

Most are slow: `pytest -m slow tests/unit/export/test_forms_of_networks.py`.
"""

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError
from pipeline.export.graph import export_graph
from pipeline.export.lint import require_clean
from pipeline.export.parity import OPTIMIZATIONS, ask_onnx, open_session
from pipeline.export.precision import _require_loadable
from pipeline.export.quantize import to_float16, to_int8
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES
from tests.unit.export.test_networks import OF_TORCHVISION, spec_at, trained

# Untrained, its activations reach 5e9, which float16 rightly cannot hold. googlenet has the same blocks.
OVERFLOWS = "inception_v3"
SLOW = [
    pytest.param(f"torchvision:{name}", side, marks=pytest.mark.slow)
    for name, side in OF_TORCHVISION.items()
    if name != OVERFLOWS
]
# onnxruntime 1.32 dies of it in float16 once it optimises.
FATAL = ("torchvision:vit_b_16", "fp16")


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), *SLOW])
def test_a_network_has_both_forms(name: str, side: int, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    spec = spec_at(tiny_spec, side)
    model = export_graph(trained(ModelConfig(name=name), 3, spec), THREE_CLASSES, spec, 20, {})
    dataset = ShardDataset(tiny_dataset, "train", spec)
    images = torch.stack([dataset.image(index) for index in range(4)])
    answers = {}
    forms = {"fp32": model, "fp16": to_float16(model), "int8": to_int8(model, [images.numpy()], "minmax")}
    for precision, form in forms.items():
        require_clean(form, spec, 20)
        level = "on"
        if (name, precision) == FATAL:
            with pytest.raises(GateError, match="signal 11"):
                _require_loadable(form)
            level = "off"
        answers[precision] = ask_onnx(open_session(form.SerializeToString(), OPTIMIZATIONS[level]), images)["probabilities"]
        assert np.isfinite(answers[precision]).all()
    # Weights rounded to 11 bits, in up to a hundred layers.
    np.testing.assert_allclose(answers["fp16"], answers["fp32"], rtol=0, atol=0.03)
    assert forms["fp16"].ByteSize() < 0.6 * model.ByteSize()
    assert forms["int8"].ByteSize() < 0.6 * model.ByteSize()
