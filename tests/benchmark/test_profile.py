"""Profiles by kind of node: of hand-made events, and of really exported files."""

import pytest

from vitoats.benchmark.profile import NodeTimes, profile, summarise
from vitoats.common.errors import InputError
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.load import load_model


def events(*nodes, runs=5):
    """(name, operator, bytes of weights, microseconds of each run); packed weights are no longer an input."""
    yield {"cat": "Session", "name": "model_loading_uri", "dur": 10**6, "args": {}}
    for run in range(runs):
        for index, (name, operator, weights, us) in enumerate(nodes):
            inputs = [{"float": [1, 2]}] * (1 if name == "packed" else 2)
            args = {"op_name": operator, "node_index": str(index), "parameter_size": str(weights), "input_type_shape": inputs}
            yield {"cat": "Node", "name": f"{name}_fence_before", "dur": 99, "args": {"op_name": operator}}
            yield {"cat": "Node", "name": f"{name}_kernel_time", "dur": us[run], "args": args}


def test_nodes_of_a_kind_are_added_up_without_the_warm_ups():
    rows = summarise(
        events(
            ("fc1", "SparseMatMul", 8, [9000, 9000, 3000, 1000, 2000]),
            ("fc2", "SparseMatMul", 8, [9000, 9000, 4000, 4000, 4000]),
            ("qk", "FusedMatMul", 0, [9000, 9000, 1000, 1000, 1000]),
            ("head", "FusedMatMul", 8, [9000, 9000, 200, 200, 900]),
            ("packed", "FusedMatMul", 0, [9000, 9000, 300, 300, 300]),
            ("softmax", "Softmax", 0, [9000, 9000, 2500, 2500, 2500]),
            ("attention", "QKVAttention", 0, [9, 9, 0, 0, 0]),
        )
    )
    assert rows == [
        NodeTimes("vitoats::SparseMatMul", True, 2, 6.0, 60.0),
        NodeTimes("Softmax", False, 1, 2.5, 25.0),
        NodeTimes("FusedMatMul (activations only)", False, 1, 1.0, 10.0),
        NodeTimes("FusedMatMul", True, 2, 0.5, 5.0),
        NodeTimes("vitoats::QKVAttention", False, 1, 0.0, 0.0),
    ]


def test_a_profile_tells_linear_layers_from_attention(tiny_folder, plain, tmp_path):
    """3 blocks with 4 linear layers and 2 products of activations each, and the classifier."""
    for name, source, own in (("dense", f"local-dir:{tiny_folder}", 0), ("sparse", str(plain), 12)):
        export_onnx(load_model(source), tmp_path / f"{name}.onnx")
        rows = profile(tmp_path / f"{name}.onnx", 2, 1)
        assert sum(row.nodes for row in rows if row.linear) == 13
        assert sum(row.nodes for row in rows if row.kind.startswith("vitoats::") and row.linear) == own
        assert sum(row.nodes for row in rows if row.kind.endswith("(activations only)")) in (0, 6)  # 0: in one operator
        assert sum(row.share for row in rows) == pytest.approx(100, abs=0.5)
        assert all(row.ms >= 0 for row in rows)


def test_a_file_that_does_not_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no ONNX file"):
        profile(tmp_path / "missing.onnx", 1, 1)
