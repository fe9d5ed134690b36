"""The table of methods, methods in files of their own, and the documentation of both."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import vitoats.methods
from vitoats.cli import common
from vitoats.cli.compress import main as compress
from vitoats.common.errors import InputError
from vitoats.methods.registry import METHODS, STRUCTURAL, get_method
from vitoats.methods.statistics import InputStatistics

DOCS = (Path(__file__).parent.parent.parent / "docs" / "methods.md").read_text()


@pytest.fixture
def own(tmp_path):
    """The documentation's example as a file."""
    file = tmp_path / "relative.py"
    file.write_text(re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1])
    return file


@pytest.fixture
def job(tiny_folder, flat_images, tmp_path):
    """Compresses the tiny model: (exit status, JSON line or None, stderr)."""

    def run(capsys, *flags):
        argv = ["--model", f"local-dir:{tiny_folder}", "--data-dir", flat_images, "--output", tmp_path / "out", "--quiet"]
        capsys.readouterr()
        status = common.run(compress, [str(a) for a in [*argv, "--nsamples", "16", "--threads", "1", *flags]])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return run


def test_every_config_can_be_made_of_flags_alone():
    for method in METHODS.values():
        config = method.config()
        assert config.total_compression() == 0.5
        assert config.budget(64, 48)
        assert all(type(getattr(config, field.name)) in (int, float, str, bool) for field in fields(config))


def test_the_documentation_lists_every_method_and_every_option():
    methods = METHODS | STRUCTURAL
    assert set(re.findall(r"^\| `([\w-]+)` \| (?:\[|\||ours)", DOCS, re.MULTILINE)) == methods.keys()
    flags = {"compression", "rank_ratio", "iterations", "pattern", "solver", "tolerance", "seed"}
    for name, method in methods.items():
        for field in fields(method.config):
            if field.name not in flags:
                said = re.search(rf"^\| `{name}` \|.*`{field.name}=([^`]*)`", DOCS, re.MULTILINE)
                assert said, (name, field.name)
                if isinstance(field.default, (str, bool)):
                    assert said[1] == {False: "false", True: "true"}.get(field.default, field.default)
                else:
                    assert float(said[1]) == pytest.approx(field.default, rel=1e-3)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_compresses_a_model_to_the_budget(job, capsys, tmp_path, name):
    every_layer = ["--method-options", "plain=true,attention=wanda"] if name == "dass" else []
    status, result, err = job(capsys, "--method", name, "--compression", "0.5", *every_layer)
    assert status == 0, err
    unit = (48 + 192) / (48 * 192) if name in ("svd", "oats") else 1 / 48
    assert result["compression"] == pytest.approx(0.5, abs=2 * unit)
    assert result["method"] == name
    errors = [layer["relative_error"] for layer in json.loads((tmp_path / "out/vitoats.json").read_text())["layers"]]
    assert len(errors) == 12
    assert all(0 < error < 1 for error in errors)
    assert torch.isfinite(vitoats.load(tmp_path / "out")(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize("pattern", ["row", "layer", "1x2", "1x4", "1:4"])
@pytest.mark.parametrize("name", ["oats", "mrp"])
def test_each_pattern_through_the_command(job, capsys, name, pattern):
    status, result, err = job(capsys, "--method", name, "--pattern", pattern, *["--rank-ratio", "0.1"] * (name == "oats"))
    assert status == 0, err
    assert result["pattern"] == pattern
    expected = {("mrp", "1:4"): 0.75, ("oats", "1:4"): 1 - 0.25 / 0.9}.get((name, pattern), 0.5)
    assert result["compression"] == pytest.approx(expected, abs=0.05)


def test_methods_decide_what_flags_leave_open(job, capsys):
    status, result, err = job(capsys, "--method", "alps", "--iterations", "6")
    assert status == 0, err
    assert (result["pattern"], result["rank_ratio"]) == ("layer", None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--method wanda --rank-ratio 0.2", "takes no --rank-ratio"),
        ("--method svd --pattern 2:4", "takes no --pattern"),
        ("--method mrp --solver exact", "takes no --solver"),
        ("--method mrp --method-options mask=M", "mask_choice, schedule, damping, block_size"),
        ("--method mrp --method-options damping=much", "type float"),
        ("--method mrp --method-options block_size=1.5", "type int"),
        ("--method mrp --method-options damping", "type float"),
        ("--method oats --method-options seed=3", "it has none"),
        ("--method oats --method-options iterations=3", "it has none"),
        ("--method sparsegpt --pattern 1:3", "multiple of 3"),
        ("--method wanda --pattern 5:32", "multiple of 32, not 48: use --pattern row"),
        ("--method wanda --pattern 2:4 --compression 0.6", "leave --compression out"),
        ("--method svd --compression 0.99", "lower --compression"),
        ("--method dass", "--method wanda, or add --method-options plain=true"),
        ("--method dass --method-options plain=yes", "type bool"),
        ("--method numerical --rank-ratio 0.2", "takes no --rank-ratio"),
        ("--method ./nowhere.py:x", "./file.py:name"),
        ("--method nowhere", "./file.py:name"),
    ],
)
def test_settings_that_a_method_does_not_take_are_refused_at_once(job, capsys, tmp_path, flags, said):
    status, result, err = job(capsys, *flags.split())
    assert (status, result) == (2, None)
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_option_reaches_the_method(job, capsys, tmp_path):
    flags = "--method mrp --pattern 2:4 --method-options mask_choice=M,damping=0.1"
    assert job(capsys, *flags.split())[0] == 0
    config = json.loads((tmp_path / "out/vitoats.json").read_text())["config"]
    assert (config["mask_choice"], config["damping"], config["block_size"]) == ("M", 0.1, 128)


class TestOwnMethods:
    """A method in the user's own file."""

    def test_the_example_of_the_documentation_works(self, own, job, capsys, tmp_path):
        status, result, err = job(capsys, "--method", f"{own}:relative", "--pattern", "1x2", "--method-options", "power=1.0")
        assert status == 0, err
        assert result["method"] == f"{own}:relative"
        assert result["compression"] == pytest.approx(0.5, abs=0.01)
        about = json.loads((tmp_path / "out/vitoats.json").read_text())
        assert about["config"]["power"] == 1.0
        assert vitoats.load(tmp_path / "out")(torch.randn(1, 3, 32, 32)).shape == (1, 4)

    def test_it_has_at_most_30_lines_and_does_what_it_says(self, own):
        assert len(own.read_text().splitlines()) <= 30
        method = get_method(f"{own}:relative")
        weight, moments = torch.randn(6, 8), torch.rand(8).double() + 0.1
        result = method.solve(weight, InputStatistics(moments), method.config(compression=0.75, power=1.0))
        size = weight.abs()
        score = (size / size.sum(1, keepdim=True) + size / size.sum(0)) * moments.sqrt()
        for row, kept in zip(score, result.S != 0, strict=True):
            assert set(row.topk(2).indices.tolist()) == set(kept.nonzero().flatten().tolist())

    def test_it_may_postpone_annotations(self, own):
        own.write_text("from __future__ import annotations\n" + own.read_text().replace('"""', "#"))
        assert get_method(f"{own}:relative").config().power == 0.5

    def test_it_runs_once_and_leaves_the_table_alone(self, own):
        own.write_text(own.read_text().replace('"relative"', '"oats"') + "\nprint('ran')\n")
        before = dict(METHODS)
        mine = get_method(f"{own}:oats")
        assert get_method(f"{own}:oats") is mine
        assert before == METHODS
        assert mine.config.__name__ == "RelativeConfig"

    def test_a_changed_file_is_another_method(self, own):
        first = get_method(f"{own}:relative")
        own.write_text(own.read_text().replace("0.5", "0.25"))
        second = get_method(f"{own}:relative")
        assert first.digest != second.digest  # so that --resume refuses it
        assert (first.config().power, second.config().power) == (0.5, 0.25)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("x = ", "does not run (SyntaxError"),
            ("raise RuntimeError('no\\nluck')", "does not run (RuntimeError: no luck)"),
            ("x = 1", "registers no method 'relative': it has none"),
            ("\x00", "does not run"),
            ("import sys; sys.exit(3)", "does not run (SystemExit"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_one_line(self, tmp_path, content, said):
        file = tmp_path / "broken.py"
        file.write_text(content)
        with pytest.raises(InputError) as caught:
            get_method(f"{file}:relative")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_users_file_may_import_all_it_needs_from_the_registry():
    from vitoats.format import decomposition
    from vitoats.methods import registry

    assert registry.Decomposition is decomposition.Decomposition
    assert {"measured", "register", "register_structural"} <= vars(registry).keys()
