"""The version of our operators, read from a file's bytes, against the package onnx."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.runtime.int8_models import attention_model
from tests.runtime.sparse_models import operator_model
from vitoats.common.errors import InputError
from vitoats.format.operator import NEWEST_DOMAIN_VERSION
from vitoats.runtime import session
from vitoats.runtime.opsets import domain_version

in_a_fresh_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@in_a_fresh_file
@given(
    opsets=st.lists(
        st.tuples(st.sampled_from(["", "vitoats", "ai.onnx.ml", "vitoats2", "com.microsoft"]), st.integers(1, 2**40)),
        unique_by=lambda opset: opset[0],
    ),
    texts=st.lists(st.text(max_size=300), min_size=3, max_size=3),
    name=st.text(max_size=300),
)
def test_versions_are_those_that_onnx_reads(tmp_path, opsets, texts, name):
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([], name, [value], [value]), opset_imports=[])
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets)
    model.producer_name, model.doc_string, model.domain = texts
    model.model_version = len(name)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert domain_version(path) == dict(opsets).get("vitoats", 0)


@in_a_fresh_file
@given(content=st.binary(max_size=100))
def test_other_bytes_have_some_version_or_none(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert domain_version(path) >= 0


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_file_that_is_cut_off_has_none(tmp_path, cut):
    content = operator_model(np.eye(4, dtype=np.float32)).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[:-cut])
    assert domain_version(path) in (0, 1)


@pytest.mark.parametrize("native", [True, False])
def test_files_of_a_newer_vitoats_are_refused(tmp_path, native):
    model = attention_model(2, 8, 0.5)
    onnx.save(model, tmp_path / "now.onnx")
    assert domain_version(tmp_path / "now.onnx") == NEWEST_DOMAIN_VERSION
    session(tmp_path / "now.onnx", native=native)
    next(opset for opset in model.opset_import if opset.domain == "vitoats").version = NEWEST_DOMAIN_VERSION + 1
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(InputError, match=r"newer vitoats .*: upgrade"):
        session(tmp_path / "later.onnx", native=native)
