"""Observes modules while a model runs, or answers for them. All forward hooks are registered and removed here.

Modules are passed with the names that callbacks receive, which may differ from their names in the model. A module's input is
its first argument.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Modules = Mapping[str, nn.Module]
Before = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]  # name, args, kwargs
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]  # name, args, kwargs, output


@contextmanager
def watch_calls(modules: Modules, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """In this context, calls ``before`` whenever one of the modules is called, and ``after`` whenever one has returned."""
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
    """In this context, calls ``seen`` with (name, input) whenever one of the modules is called."""
    with watch_calls(modules, before=lambda name, args, kwargs: seen(name, first_input(args, kwargs))):
        yield


@contextmanager
def watch_outputs(modules: Modules, seen: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """In this context, calls ``seen`` with (name, input, output) whenever one of the modules has returned."""
    with watch_calls(modules, after=lambda name, args, kwargs, output: seen(name, first_input(args, kwargs), output)):
        yield


def inputs_of(modules: Modules, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Calls ``run`` and aborts it as soon as each of the modules has been called.

    Returns:
        the input of each module by name; that of its last call, if there were several.

    Raises:
        AssertionError: ``run`` returned before all modules were called.
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


@contextmanager
def answer_for(modules: Iterable[tuple[nn.Module, Callable[[], Tensor]]]) -> Iterator[None]:
    """In this context, modules do not run: a call of one of them returns what the function beside it gives."""
    answered = []
    try:
        for module, answer in modules:
            module.forward = _Answer(answer)
            answered.append(module)
        yield
    finally:
        for module in answered:
            del module.forward


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's first argument; by keyword, timm names it ``x`` and transformers ``hidden_states``."""
    return args[0] if args else kwargs.get("x", kwargs.get("hidden_states"))


class _AllReachedError(Exception):
    """Aborts a forward pass once all modules have been reached."""


class _Answer:
    """A forward method that ignores its arguments."""

    def __init__(self, answer: Callable[[], Tensor]):
        self.answer = answer

    def __call__(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.answer()


def _before(name: str, told: Before) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told(name, args, kwargs)  # returning a value from this hook would replace the input

    return hook


def _after(name: str, told: After) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        told(name, args, kwargs, output)

    return hook
