"""What other tools make of our files, as docs/deploy.md has it: outputs stay those of the file, nodes are kept or go."""

import contextlib
import importlib
import io
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, compose, helper, version_converter
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.data.transforms import Preprocessing
from vitoats.export.onnx_file import export_onnx
from vitoats.format.operator import DOMAIN
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import session

IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
X = IMAGES[:2].numpy()

FORMS = {"sparse": {}, "int8": {"int8": True}, "inline": {"form": "inline"}}

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other tools


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    model = make_tiny()
    compress_in_place(model, IMAGES, job_of("oats", OATSConfig(iterations=3)))
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    folder = tmp_path_factory.mktemp("files")
    for form, arguments in FORMS.items():
        export_onnx(loaded, folder / f"{form}.onnx", **arguments)
    plain = LoadedModel("tiny", make_tiny(), Preprocessing(img_size=32), "random")
    export_onnx(plain, folder / "plain.onnx")
    return {form: folder / f"{form}.onnx" for form in (*FORMS, "plain")}


def ours(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node if node.domain == DOMAIN)


def outputs(path: Path, native: bool = True, x: np.ndarray = X) -> np.ndarray:
    opened = session(path, native=native)
    return opened.run(None, {opened.get_inputs()[0].name: x})[0].astype(np.float32)


def check_same(before: Path, after: Path, tolerance: float, native: tuple[bool, ...] = (True, False)) -> None:
    for with_library in native:
        expected, found = outputs(before, with_library), outputs(after, with_library)
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = [{"images": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


# each tool as its documentation calls it: the file to read, the file to write


def dynamic(before: Path, after: Path) -> None:
    quantize_dynamic(before, after)


def static(before: Path, after: Path) -> None:
    quantize_static(before, after, Images())


def preprocess_shapes_only(before: Path, after: Path) -> None:
    quant_pre_process(str(before), str(after), skip_optimization=True)


def make_batch_fixed(before: Path, after: Path) -> None:
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(str(before))
    make_dim_param_fixed(model.graph, "batch", 2)
    onnx.save(model, str(after))


def weights_to_4_bits(before: Path, after: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(before)), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(after))


def prepend(before: Path, after: Path) -> None:
    """Puts a scaling of pixels before the model."""
    model = onnx.load(str(before))
    shape = ["batch", 3, 32, 32]
    pixels, scaled = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixels", "scaled"))
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph([helper.make_node("Mul", ["pixels", "one"], ["scaled"])], "before", [pixels], [scaled], [one])
    scaling = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=model.ir_version)
    onnx.save(compose.merge_models(scaling, model, [("scaled", "images")]), str(after))


def extract(before: Path, after: Path) -> None:
    onnx.utils.extract_model(str(before), str(after), ["images"], ["logits"])


def onnxslim(before: Path, after: Path) -> None:
    importlib.import_module("onnxslim").slim(str(before), str(after))


def onnxsim(before: Path, after: Path) -> None:
    model, same = importlib.import_module("onnxsim").simplify(onnx.load(str(before)))
    assert same
    onnx.save(model, str(after))


def external_data(before: Path, after: Path) -> None:
    onnx.save(onnx.load(str(before)), str(after), save_as_external_data=True, location=f"{after.name}.data")


KEEPING: dict[Callable[[Path, Path], None], float] = {  # tools that keep our nodes, and how far outputs may move
    dynamic: 0.05,
    static: 0.3,
    weights_to_4_bits: 0.3,
    preprocess_shapes_only: 1e-5,
    make_batch_fixed: 1e-5,
    prepend: 1e-5,
    extract: 1e-5,
    onnxslim: 1e-5,
    onnxsim: 1e-5,
    external_data: 1e-5,
}


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tool", KEEPING, ids=lambda tool: tool.__name__)
def test_tools_that_keep_our_nodes(files, tool, form, tmp_path):
    if tool.__name__.startswith("onnxs"):
        pytest.importorskip(tool.__name__)
    before, after = files[form], tmp_path / "after.onnx"
    tool(before, after)
    assert ours(after) == ours(before)
    check_same(before, after, KEEPING[tool])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("form", ["plain", "inline"])
def test_onnx_runtime_quantizes_all_layers_of_a_file_without_our_nodes(files, form, tmp_path):
    quantize_dynamic(files[form], tmp_path / "after.onnx")
    assert Counter(node.op_type for node in onnx.load(tmp_path / "after.onnx").graph.node)["MatMulInteger"] == 13


@pytest.mark.parametrize(("form", "warned"), {"sparse": True, "int8": True, "inline": False, "plain": False}.items())
def test_optimizing_for_quantization_unpacks_our_nodes_and_a_session_warns_of_it(files, form, warned, tmp_path, caplog):
    after = tmp_path / "after.onnx"
    quant_pre_process(str(files[form]), str(after))
    assert not ours(after)
    check_same(files[form], after, 1e-5, native=(False,))
    caplog.clear()
    outputs(after)
    assert ("a tool has unpacked its sparse nodes" in caplog.text) == warned


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("version", [21])
@pytest.mark.parametrize("form", ["sparse", "int8"])
def test_the_version_converter_keeps_our_nodes_and_drops_their_functions(files, form, version, tmp_path):
    before, after = onnx.load(str(files[form])), tmp_path / "after.onnx"
    converted = version_converter.convert_version(before, version)
    onnx.save(converted, str(after))
    assert ours(after) == ours(files[form])
    assert not converted.functions
    check_same(files[form], after, 1e-5, native=(True,))
    converted.functions.extend(before.functions)
    onnx.save(converted, str(after))
    check_same(files[form], after, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", ["onnxconverter_common.float16", "onnxruntime.transformers.float16"])
def test_float16_runs_at_dense_speed(files, form, module, tmp_path, caplog):
    """Nodes in float16 run in stock ONNX Runtime; the library needs ours in float32."""
    convert = pytest.importorskip(module).convert_float_to_float16
    after = tmp_path / "after.onnx"
    onnx.save(convert(onnx.load(str(files[form])), keep_io_types=True), str(after))
    assert ours(after) == ours(files[form])
    check_same(files[form], after, 0.02)
    assert ("op_block_list" in caplog.text) == (form != "inline")


@pytest.mark.parametrize("form", ["sparse", "int8"])
def test_float16_with_our_nodes_left_out_runs_natively(files, form, tmp_path, caplog):
    float16 = pytest.importorskip("onnxconverter_common.float16")
    block_list = [*float16.DEFAULT_OP_BLOCK_LIST, *ours(files[form])]
    model = float16.convert_float_to_float16(onnx.load(str(files[form])), keep_io_types=True, op_block_list=block_list)
    onnx.save(model, str(tmp_path / "after.onnx"))
    check_same(files[form], tmp_path / "after.onnx", 0.03)
    assert not caplog.text


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision(files, form, tmp_path):
    convert = pytest.importorskip("onnxconverter_common.auto_mixed_precision").auto_convert_mixed_precision
    mixed = convert(onnx.load(str(files[form])), {"images": X}, rtol=0.05, atol=0.05, keep_io_types=True)
    onnx.save(mixed, str(tmp_path / "after.onnx"))
    assert ours(tmp_path / "after.onnx") == ours(files[form])
    check_same(files[form], tmp_path / "after.onnx", 0.02)


def test_prefixes_rename_functions_unless_told_not_to(files, tmp_path):
    model = onnx.load(str(files["sparse"]))
    onnx.save(compose.add_prefix(model, "first/"), str(tmp_path / "renamed.onnx"))
    assert all(name.startswith("first/") for name in ours(tmp_path / "renamed.onnx"))
    onnx.save(compose.add_prefix(model, "first/", rename_functions=False), str(tmp_path / "kept.onnx"))
    assert ours(tmp_path / "kept.onnx") == ours(files["sparse"])
    check_same(files["sparse"], tmp_path / "kept.onnx", 1e-5)


@pytest.mark.parametrize("form", ["sparse", "int8"])
def test_the_middle_of_a_model_can_be_cut_out(files, form, tmp_path):
    """Values have the names of their layers."""
    after, end_of_block = tmp_path / "block.onnx", {"sparse": "blocks.0.Add.2.y", "int8": "blocks.0.mlp.y"}[form]
    onnx.utils.extract_model(str(files[form]), str(after), [end_of_block], ["blocks.1.attn.y"])
    assert session(after).native_nodes == ({"sparse": "blocks.1.attn.qkv", "int8": "blocks.1.attn"}[form],)


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_every_value_has_a_shape_and_every_node_a_readable_name(files, form):
    graph = onnx.load(str(files[form])).graph
    weights = {tensor.name for tensor in graph.initializer}
    known = {info.name for info in graph.value_info}
    assert not known & weights
    made = [name for node in graph.node for name in node.output]
    assert set(made) - {"logits"} <= known
    assert all(node.name for node in graph.node)
    assert len({node.name for node in graph.node}) == len(graph.node)
    for name in (*made, *weights, *(node.name for node in graph.node)):
        assert not name.startswith(("_", "val_", "node_", "getitem"))
    named = {"plain": "blocks.0.mlp.fc1.MatMul.y", "int8": "blocks.0.mlp.y"}.get(form, "blocks.0.attn.qkv.y")
    assert named in made


def test_ort_keeps_our_nodes_where_the_library_is_registered(files, tmp_path):
    from vitoats.runtime import register

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    register(options)
    ort.InferenceSession(str(files["sparse"]), options, providers=["CPUExecutionProvider"])
    assert ours(tmp_path / "optimized.onnx") == ours(files["sparse"])
