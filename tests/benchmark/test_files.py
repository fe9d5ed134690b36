"""Exported files against the first of them."""

import numpy as np
import onnx
import pytest

from tests.runtime.sparse_models import operator_model
from vitoats.benchmark.files import compare_files
from vitoats.common.errors import InputError


@pytest.fixture
def files(tmp_path):
    """Two files that take [b, t, 8]: t is free, so batches of 3 tokens are made of their fixed shape."""
    paths = []
    for name, n in (("small", 8), ("large", 400)):
        model = operator_model(np.ones((n, 8), np.float32))
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(model, paths[-1])
    return paths


def test_rows_go_by_threads_then_batch_then_file(files):
    rows = compare_files(files, [1, 4], [1, 2], turn_seconds=0.001)
    assert [(row.threads, row.batch, row.file) for row in rows] == [
        (threads, batch, str(file)) for threads in (1, 2) for batch in (1, 4) for file in files
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first.speedup == 1
        assert second.speedup == pytest.approx(first.ms / second.ms, rel=0.1, abs=0.1)  # of rounded times
        assert (first.native_nodes, second.native_nodes) == (1, 1)
        assert second.file_mb == round(files[1].stat().st_size / 1e6, 2)


def test_files_for_images_of_different_shapes_are_refused(files, tmp_path):
    model = operator_model(np.ones((8, 8), np.float32))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="`img_size`"):
        compare_files([*files, tmp_path / "other.onnx"], [1], [1])
    with pytest.raises(InputError, match=r"nowhere\.onnx"):
        compare_files([tmp_path / "nowhere.onnx"], [1], [1])
