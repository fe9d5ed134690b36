"""Bad input to a comparison is one line, and writes nothing."""

import pytest

from tests.comparison.runs import one_run, refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--methods=wanda,magic"], "unknown method 'magic'"),
        (["--methods=wanda,wanda"], "named twice"),
        (["--methods=wanda,"], "METHOD or LABEL=METHOD"),
        (["--methods=dense"], "always a row"),
        (["--methods=a/b=wanda,a:b=wanda"], "two runs would be called a_b"),
        (["--compressions=1.5"], "wanda, pattern own, compression 1.5"),
        (["--compressions=nan"], "--compression"),
        (["--compressions=half"], "list of numbers"),
        (["--patterns=column"], "unknown pattern"),
        (["--methods=svd", "--patterns=row,2:4"], "add own to --patterns"),
        (["--methods=oats", "--patterns=2:4", "--options=oats:rank_ratio=0.6"], "--options oats:NAME=VALUE"),
        (["--options=oats:iterations=3"], "names no method of --methods"),
        (["--options=wanda:damping=3"], "no option 'damping'"),
        (["--options=wanda:iterations=3"], "takes no --iterations"),
        (["--options=wanda:iterations"], "--options"),
        (["--options=wanda:compression=0.3"], "no setting of one method"),
        (["--options=wanda:seed=3"], "no setting of one method"),
        (["--options=wanda:fused_qkv=1"], "true, or left out"),
        (["--num-samples=0"], "--num-samples"),
        (["--num-samples=1"], "--num-samples"),
        (["--ood-dir=/no/such"], "/no/such"),
        (["--data-dir=FLAT"], "labels"),
        (["--output=FILE"], "--output"),
        (["--output=FULL"], "holds no comparison"),
        (["--device=banana"], "--device cpu"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny_folder, data, flat_images, tmp_path, capsys, change, said):
    places = {"FLAT": flat_images, "FILE": tmp_path / "file", "FULL": tmp_path / "full"}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    for name, path in places.items():
        change = [c.replace(name, str(path)) for c in change]
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, one_run(tiny_folder, data, tmp_path / "out", *change))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", ["--output", "--methods", "--model", "--data-dir"])
def test_what_must_be_given(tiny_folder, data, tmp_path, capsys, missing):
    argv = one_run(tiny_folder, data, tmp_path / "out")
    at = argv.index(missing)
    assert missing in refused(capsys, argv[:at] + argv[at + 2 :])


def test_a_model_without_classifier_is_refused(data, tmp_path, capsys):
    argv = ["--model", "vit_small_patch14_dinov2", "--random-weights", "--img-size", "28", "--methods", "wanda", "--quiet"]
    assert "--head" in refused(capsys, [*argv, f"--data-dir={data}", f"--output={tmp_path / 'out'}"])
