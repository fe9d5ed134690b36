"""Whole-model compression: each layer is what the method gives on the inputs that the compressed prefix makes."""

import dataclasses

import pytest
import torch

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.compression.resume import BlockStore
from vitoats.format.layers import compressed_layers
from vitoats.methods.mrp import MRPConfig, mrp
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.statistics import InputStatistics

CONFIG = OATSConfig(compression=0.5, rank_ratio=0.25, iterations=6)


def run(model, images, config=CONFIG, **work):
    return compress_in_place(model, images, job_of("oats", config), **work)


def statistics(model, names, images) -> dict[str, InputStatistics]:
    moments = {}

    def measure(name, x):
        moments[name] = InputStatistics.of(x.reshape(-1, x.shape[-1]))

    handles = [model.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: measure(n, args[0])) for n in names]
    with torch.inference_mode():
        model(images)
    for handle in handles:
        handle.remove()
    return moments


def test_each_layer_is_oats_on_the_inputs_that_the_compressed_prefix_makes():
    """Restated with plain hooks on whole forward passes: block b sees blocks 0..b-1 compressed and itself dense."""
    images = torch.randn(8, 3, 32, 32)
    dense, model = make_tiny(), make_tiny()
    report = run(model, images)
    weights = {n: m.weight.data for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    for b in range(3):
        names = [f"blocks.{b}.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        moments = statistics(dense, names, images)
        for name in names:
            parts = weights[name].chunk(3 if name.endswith("qkv") else 1)
            expected = torch.cat([r.S + r.U @ r.V for r in (oats(w, moments[name], CONFIG) for w in parts)])
            assert torch.allclose(compressed_layers(model)[name].weight, expected, atol=1e-4), name
            dense.get_submodule(name).weight.data = expected
    assert [row.name for row in report.layers] == list(compressed_layers(model))


def test_figures_by_hand():
    images = torch.randn(8, 3, 32, 32)
    model, dense = make_tiny(), make_tiny()
    report = run(model, images)
    row = report.layers[0]
    layer = model.blocks[0].attn.qkv
    assert (row.d_out, row.d_in, row.ranks) == (144, 48, (3, 3, 3))
    assert row.nonzeros == int((layer.S != 0).sum()) == 144 * (48 - int(48 * 0.625))
    assert row.kept_parameters == row.nonzeros + 3 * 3 * (48 + 48)
    kept = sum(r.kept_parameters for r in report.layers)
    assert report.compression == pytest.approx(1 - kept / sum(r.d_out * r.d_in for r in report.layers))
    assert abs(report.compression - 0.5) < 0.03  # layers of width 48 round coarsely
    assert report.n_images == 8
    # the solver's error is that of the output where inputs are uncorrelated, the relative error that of the output
    with torch.inference_mode():
        x = dense.blocks[0].norm1(dense._pos_embed(dense.patch_embed(images))).reshape(-1, 48)
    D = x.double().square().mean(dim=0).sqrt()
    W = dense.blocks[0].attn.qkv.weight.double()
    assert row.solver_error == pytest.approx((((layer.weight - W) * D).norm() / (W * D).norm()).item(), rel=1e-4)
    lost = ((layer.weight - W) @ x.double().T).norm() / (W @ x.double().T).norm()
    assert row.relative_error == pytest.approx(lost.item(), rel=1e-4)


def test_methods_that_need_the_full_second_moment_report_the_true_output_error():
    """Block 0 restated: MRP on the inputs' own H, and the error measured on the tokens."""
    images = torch.randn(8, 3, 32, 32)
    model, dense = make_tiny(), make_tiny()
    config = MRPConfig(compression=0.5)
    report = compress_in_place(model, images, job_of("mrp", config))
    with torch.inference_mode():
        x = dense.blocks[0].norm1(dense._pos_embed(dense.patch_embed(images))).reshape(-1, 48).double()
    weight = dense.blocks[0].attn.qkv.weight.detach()
    parts = [mrp(w, InputStatistics.of(x), config) for w in weight.chunk(3)]
    got = compressed_layers(model)["blocks.0.attn.qkv"].weight
    assert torch.allclose(got, torch.cat([p.S for p in parts]), atol=1e-4)
    error = ((got - weight).double() @ x.T).norm() / (weight.double() @ x.T).norm()
    assert report.layers[0].relative_error == pytest.approx(error.item(), rel=1e-3)
    assert report.compression == pytest.approx(0.5)


def test_q_k_and_v_apart_or_fused():
    images = torch.randn(8, 3, 32, 32)
    apart, fused = make_tiny(), make_tiny()
    run(apart, images)
    compress_in_place(fused, images, job_of("oats", CONFIG, fused_qkv=True))
    assert apart.blocks[0].attn.qkv.parts == [(48, 3)] * 3
    assert fused.blocks[0].attn.qkv.parts == [(144, int(0.25 * 0.5 * 144 * 48 / 192))]


def test_batch_size_and_a_mapped_file_change_nothing_that_matters(tmp_path):
    images = torch.randn(8, 3, 32, 32)
    first, second = make_tiny(), make_tiny()
    run(first, images)
    compress_in_place(second, images, job_of("oats", CONFIG), spill_to=tmp_path)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_budget_that_leaves_nothing_shows_before_the_work(tmp_path):
    store = BlockStore(tmp_path / "state", "x", resume=False)
    with pytest.raises(InputError, match="leaves nothing"):
        run(make_tiny(), torch.randn(4, 3, 32, 32), OATSConfig(compression=0.98, rank_ratio=1.0), state=store)
    assert not list((tmp_path / "state").glob("block_*"))


class TestResume:
    """An interrupted run goes on where it was, and only with the same model and settings."""

    def interrupt(self, tmp_path, images, at_block: int) -> None:
        store = BlockStore(tmp_path / "state", "same", resume=False)

        def stop(block: int, _n: int, what: str) -> None:
            if block == at_block and what == "calibrating":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(make_tiny(), images, state=store, progress=stop)
        assert len(list((tmp_path / "state").glob("block_*"))) == at_block

    @pytest.mark.parametrize("at_block", [1, 2])
    def test_resumed_equals_uninterrupted(self, tmp_path, at_block):
        images = torch.randn(8, 3, 32, 32)
        self.interrupt(tmp_path, images, at_block)
        whole, resumed, done = make_tiny(), make_tiny(), []
        expected = run(whole, images)
        store = BlockStore(tmp_path / "state", "same", resume=True)
        report = run(resumed, images, state=store, progress=lambda block, _n, what: done.append((block, what)))
        assert (0, "resuming") in done
        assert (0, "calibrating") not in done
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        timeless = [dataclasses.replace(row, seconds=0) for row in expected.layers]
        assert [dataclasses.replace(row, seconds=0) for row in report.layers] == timeless

    def test_another_run_is_refused(self, tmp_path):
        self.interrupt(tmp_path, torch.randn(8, 3, 32, 32), 1)
        with pytest.raises(InputError, match="another model"):
            BlockStore(tmp_path / "state", "different", resume=True)
        with pytest.raises(InputError, match="`resume`"):
            BlockStore(tmp_path / "state", "same", resume=False)

    def test_a_block_without_linear_layers_is_kept_as_well(self, tmp_path):
        """A convolution between two stages, say."""
        store = BlockStore(tmp_path / "state", "same", resume=False)
        store.save(0, {}, [], {})
        assert store.load(0, []) == ({}, [], {})
        assert store.load(1, []) is None

    def test_an_interruption_before_the_first_block_leaves_nothing(self, tmp_path):
        store = BlockStore(tmp_path / "state", "same", resume=False)
        store.settle()
        assert not list(tmp_path.iterdir())
