"""What a compression will do is settled, and refused if it cannot be, before anything is computed."""

import dataclasses

import pytest

import vitoats.methods  # noqa: F401  (fills the table of methods)
from tests.in_place import job_of
from vitoats.common.errors import InputError
from vitoats.compression import plan
from vitoats.compression.estimates import estimate_memory
from vitoats.compression.plan import chosen_blocks, plan_compression, plan_memory
from vitoats.methods.dass import DaSSConfig
from vitoats.methods.oats_h import OATSHConfig
from vitoats.methods.registry import get_method
from vitoats.methods.wanda import WandaConfig
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs


@pytest.fixture
def adapter(tiny):
    return adapt(tiny, ImageInputs(32))


def make(adapter, method="oats-h", config=None, budgets=None, scratch=None, **settings):
    job = job_of(method, config or OATSHConfig(), **settings)
    return plan_compression(adapter, job, 8, scratch).with_budgets(job.config, budgets)


def test_budgets_of_single_layers_change_their_configs_alone(adapter):
    made = make(adapter, budgets={"blocks.1.mlp.fc1": {"compression": 0.7}})
    changed = {name for name, config in made.configs.items() if config != OATSHConfig()}
    assert changed == {"blocks.1.mlp.fc1"}
    assert made.configs["blocks.1.mlp.fc1"] == dataclasses.replace(OATSHConfig(), compression=0.7)
    assert len(made.configs) == 12


def test_layers_that_the_method_leaves_dense_are_in_no_block(adapter):
    blocks, left = chosen_blocks(adapter, get_method("dass"), DaSSConfig(plain=True))
    assert [[x.name.split(".", 2)[2] for x in block.linears] for block in blocks] == [["mlp.fc1", "mlp.fc2"]] * 3
    assert len(left) == 6
    assert [len(block.linears) for block in adapter.blocks] == [4, 4, 4]


def test_a_fused_qkv_is_one_part_if_asked(adapter):
    for fused, parts in ((False, 3), (True, 1)):
        assert make(adapter, fused_qkv=fused).adapter.blocks[0].linears[0].parts == parts


@pytest.mark.parametrize(
    ("method", "config", "settings", "level"),
    [
        ("wanda", WandaConfig(), {}, "diagonal"),
        ("wanda", WandaConfig(), {"target": "sequential"}, "diagonal"),
        ("wanda", WandaConfig(), {"refit_bias": True}, "full"),
        ("wanda", WandaConfig(), {"target": "dense"}, "full"),
        ("dass", DaSSConfig(plain=True), {}, "neurons"),
        ("oats-h", OATSHConfig(), {}, "full"),
    ],
)
def test_no_more_is_collected_than_is_needed(adapter, method, config, settings, level):
    assert make(adapter, method, config, **settings).level == level


def test_a_method_of_neurons_takes_no_target_that_needs_means(adapter):
    with pytest.raises(InputError, match="knows nothing of means"):
        make(adapter, "dass", DaSSConfig(plain=True), target="residual")


def test_what_would_run_again_is_kept_where_there_is_room(adapter, monkeypatch, tmp_path):
    assert not make(adapter).keep  # on one path nothing would
    assert make(adapter, target="residual").keep
    monkeypatch.setattr(plan, "MEMORY_SHARE", 0.0)
    assert not make(adapter, target="residual").keep


def test_hidden_states_go_to_a_file_above_the_limit_and_what_does_not_fit_even_so_is_refused(adapter, tmp_path):
    estimate = estimate_memory(adapter, nsamples=8, batch_size=4, factors=0, compression=0.5)
    assert plan_memory(estimate, None, tmp_path) is None
    assert plan_memory(estimate, estimate.total, tmp_path) is None
    assert plan_memory(estimate, estimate.total - 1, tmp_path) == tmp_path
    assert plan_memory(estimate, estimate.total - estimate.hidden, tmp_path) == tmp_path
    with pytest.raises(InputError, match="`batch_size`, or raise `memory_limit`"):
        plan_memory(estimate, estimate.total - estimate.hidden - 1, tmp_path)
    with pytest.raises(InputError, match="above the memory limit"):  # before anything is computed
        make(adapter, target="residual", memory_limit=1e-9, scratch=tmp_path)
    with pytest.raises(InputError, match="needs a folder"):
        plan_memory(estimate, estimate.total - 1, None)
