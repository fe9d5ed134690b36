"""Hooks: who is told of what, and that none is left behind, whatever happens."""

import pytest
import torch
from torch import nn

from vitoats.models.hooks import inputs_of, watch_calls, watch_inputs, watch_outputs


class Named(nn.Module):
    """Calls its layers by position, by name, and twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = (Double() for _ in range(3))

    def forward(self, x):
        return self.twice(self.twice(self.second(x=self.first(x), scale=3)))


class Double(nn.Module):
    def forward(self, x, scale=2):
        return x * scale


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_calls_are_told_in_order_with_all_arguments():
    model, told = Named(), []
    with watch_calls(
        dict(model.named_children()),
        lambda name, args, kwargs: told.append((name, len(args), set(kwargs))),
        lambda name, _args, _kwargs, output: told.append((name, output.item())),
    ):
        assert model(torch.tensor(1.0)) == 24
    assert told[:4] == [("first", 1, set()), ("first", 2.0), ("second", 0, {"x", "scale"}), ("second", 6.0)]
    assert [row[0] for row in told[4:]] == ["twice"] * 4
    assert not any(hooks(model))


def test_an_input_is_the_first_argument_or_the_one_named_x():
    model, inputs, outputs = Named(), [], []
    modules = {"a": model.first, "b": model.second}
    with (
        watch_inputs(modules, lambda name, x: inputs.append((name, x.item()))),
        watch_outputs(modules, lambda name, x, y: outputs.append((name, x.item(), y.item()))),
    ):
        model(torch.tensor(1.0))
    assert inputs == [("a", 1.0), ("b", 2.0)]
    assert outputs == [("a", 1.0, 2.0), ("b", 2.0, 6.0)]


def test_what_a_callback_returns_changes_nothing():
    model = Named()
    with watch_inputs({"": model.first}, lambda _name, _x: torch.tensor(100.0)):
        assert model(torch.tensor(1.0)) == 24


def test_hooks_go_when_what_they_watch_fails():
    model = Named()

    def fail(_name, _x):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), watch_inputs({"": model.second}, fail):
        model(torch.tensor(1.0))
    assert not any(hooks(model))


def test_a_run_ends_once_all_inputs_are_known():
    model, ran = Named(), []
    model.twice.register_forward_hook(lambda *_: ran.append(1))
    found = inputs_of({"one": model.first, "two": model.second}, lambda: model(torch.tensor(1.0)))
    assert found == {"one": 1.0, "two": 2.0}
    assert not ran


def test_modules_that_are_not_called_are_named():
    model = Named()
    with pytest.raises(AssertionError, match="not called: beside"):
        inputs_of({"one": model.first, "beside": nn.Identity()}, lambda: model(torch.tensor(1.0)))
    assert not any(hooks(model))
