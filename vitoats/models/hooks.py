"""Watching modules while a model runs: hooks are put on and taken off here alone.

Modules are given by the names that callbacks are to be told, which need not be their names in the model. A module's input is
the first thing that it is called with.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Modules = Mapping[str, nn.Module]
Before = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]  # name, args, kwargs
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]  # name, args, kwargs, output


@contextmanager
def watch_calls(modules: Modules, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Within it ``before`` is told of each call of these modules, and ``after`` of each that has returned."""
    handles = []
    try:
        for name, module in modules.items():
            if before is not None:
                handles.append(module.register_forward_pre_hook(_before(name, before), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(_after(name, after), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_inputs(modules: Modules, seen: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within it ``seen`` gets (name, input) whenever one of these modules is called."""
    with watch_calls(modules, before=lambda name, args, kwargs: seen(name, first_input(args, kwargs))):
        yield


@contextmanager
def watch_outputs(modules: Modules, seen: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Within it ``seen`` gets (name, input, output) whenever one of these modules has returned."""
    with watch_calls(modules, after=lambda name, args, kwargs, output: seen(name, first_input(args, kwargs), output)):
        yield


def inputs_of(modules: Modules, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Calls ``run`` until each of these modules has been called; what would come after that is not run.

    Returns:
        the inputs of their (last) calls until then, by name.

    Raises:
        AssertionError: ``run`` returned, and some were not called.
    """
    caught: dict[str, Tensor] = {}

    def catch(name: str, x: Tensor) -> None:
        caught[name] = x
        if len(caught) == len(modules):
            raise _AllReachedError

    try:
        with watch_inputs(modules, catch):
            run()
    except _AllReachedError:
        return caught
    raise AssertionError(f"not called: {', '.join(sorted(modules.keys() - caught.keys()))}")


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is called with first; timm calls it ``x`` where it is given by name."""
    return args[0] if args else kwargs.get("x")


class _AllReachedError(Exception):
    """Ends a forward pass once all that was asked for is known."""


def _before(name: str, told: Before) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told(name, args, kwargs)  # a hook that returned something would change the input

    return hook


def _after(name: str, told: After) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        told(name, args, kwargs, output)

    return hook
