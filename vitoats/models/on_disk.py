"""Modules whose weights are on disk while nothing runs them, so that a model may be larger than memory.

Such a module's parameters are on torch's meta device. They are read when the module is called, or at the beginning of a
``held`` context, and dropped afterwards. Its buffers stay in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

ATTRIBUTE = "on_disk"  # of a module
Read = Callable[[], dict[str, Tensor]]


class OnDisk:
    """Reads a module's tensors while it runs or is held.

    Attributes:
        module: the module.
        read: gives its parameters as they are now, by name inside the module, on its device. A module that has been changed
            gets a new function.
    """

    def __init__(self, module: nn.Module, read: Read):
        self.module, self.read = module, read
        self._holders = 0
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._before_call()),
            module.register_forward_hook(lambda *_: self._after_call(), always_call=True),
        ]
        setattr(module, ATTRIBUTE, self)
        self._drop()

    def enter(self) -> None:
        """Reads the parameters, unless they are in memory."""
        self._holders += 1
        if self._holders == 1:
            self.module.load_state_dict(self.read(), strict=False, assign=True)

    def leave(self) -> None:
        """Drops the parameters, unless something else holds them."""
        self._holders -= 1
        if self._holders == 0:
            self._drop()

    def stay(self) -> None:
        """From now on the module is an ordinary one, in memory."""
        self.enter()
        for hook in self._hooks:
            hook.remove()
        delattr(self.module, ATTRIBUTE)

    def _drop(self) -> None:
        for module in self.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def _before_call(self) -> None:
        if not self._is_replaced():
            self.enter()

    def _after_call(self) -> None:
        if not self._is_replaced():
            self.leave()

    def _is_replaced(self) -> bool:
        """Whether another function stands for the module's own ``forward``, which then needs no weights."""
        return "forward" in self.module.__dict__

    def __deepcopy__(self, _memo: dict[int, Any]) -> "OnDisk":
        return self  # a copy of a held module has its parameters in memory


def on_disk(module: nn.Module) -> OnDisk | None:
    """What reads a module's parameters; None for a module in memory."""
    return getattr(module, ATTRIBUTE, None)


@contextmanager
def held(module: nn.Module | None) -> Iterator[None]:
    """In this context, a module's parameters are in memory."""
    reader = None if module is None else on_disk(module)
    if reader is None:
        yield
        return
    reader.enter()
    try:
        yield
    finally:
        reader.leave()


def size_in_memory(module: nn.Module) -> int:
    """Bytes of a module's parameters that stay in memory."""
    return sum(parameter.nbytes for parameter in module.parameters() if not parameter.is_meta)


def largest_on_disk(model: nn.Module) -> int:
    """Bytes that the largest of a model's modules on disk takes while it runs, in float32; 0 if there is none."""
    sizes = [4 * sum(p.numel() for p in module.parameters()) for module in model.modules() if on_disk(module)]
    return max(sizes, default=0)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """In this context, parameters of new modules are on the meta device; their buffers are made as usual."""

    def move(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = registration.register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()
