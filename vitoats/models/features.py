"""A timm backbone whose outputs are its tokens after the final norm, for detection, segmentation and retrieval.

    cls          cls [b, d]                        DINOv2's x_norm_clstoken
    patches      patches [b, n, d]                 x_norm_patchtokens, row by row; of feature maps, their positions
    all          cls, registers [b, r, d] if there are any, patches
    layers=4     cls_8 [b, d], patches_8 [b, n, d], ..., cls_11, patches_11: the last 4 of 12 blocks, after the final norm
    layers=2,5   the same of blocks 2 and 5, counted from 0

Models without a class token have no cls.
"""

from typing import Any

from torch import Tensor, nn

from vitoats.common.errors import InputError

KINDS = ("cls", "patches", "all")


class FeatureOutputs(nn.Module):
    """Images [b, 3, h, w] to a tuple of tokens.

    Attributes:
        backbone: the timm model.
        names: the names of the outputs.
    """

    def __init__(self, backbone: Any, kind: str):
        """Chooses the outputs.

        Raises:
            InputError: the model has no such features, or ``kind`` is none of those above.
        """
        super().__init__()
        self.backbone = backbone
        self.prefix = getattr(backbone, "num_prefix_tokens", 0)
        self.registers = min(getattr(backbone, "num_reg_tokens", 0), self.prefix)
        has_cls = self.prefix > self.registers
        if not hasattr(backbone, "forward_intermediates"):
            raise InputError(f"timm takes no features out of a {type(backbone).__name__}: leave `features` out")
        if kind == "cls" and not has_cls:
            raise InputError(f"{type(backbone).__name__} has no class token here: use `features='patches'`")
        depth = len(backbone.feature_info)
        self.indices, self.kinds = [depth - 1], list(KINDS[:2]) if kind == "all" else [kind]
        if kind.startswith("layers="):
            self.indices, self.kinds = _indices(kind, depth), list(KINDS[:2])
        elif kind not in KINDS:
            raise InputError(f"there are no features {kind!r}: use cls, patches, all, layers=4 or layers=2,5,8,11 (`features`)")
        if kind == "all" and self.registers:
            self.kinds.insert(1, "registers")
        if not has_cls:
            self.kinds = [k for k in self.kinds if k != "cls"]
        numbered = kind.startswith("layers=")
        self.names = tuple(f"{k}_{i}" if numbered else k for i in self.indices for k in self.kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        more = {"return_prefix_tokens": True} if self.prefix else {}
        found = self.backbone.forward_intermediates(
            x, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True, **more
        )
        outputs: list[Tensor] = []
        for item in found:
            maps, prefix = item if self.prefix else (item, x)
            tokens = {"patches": maps.flatten(2).transpose(1, 2)}
            if self.prefix:
                tokens |= {"cls": prefix[:, 0], "registers": prefix[:, self.prefix - self.registers :]}
            outputs += [tokens[kind] for kind in self.kinds]
        return tuple(outputs)


def _indices(kind: str, depth: int) -> list[int]:
    """The layers of ``layers=4``, the last four, or of ``layers=2,5``, each counted from 0."""
    try:
        given = [int(number) for number in kind.removeprefix("layers=").split(",")]
    except ValueError:
        given = []
    found = list(range(depth - given[0], depth)) if len(given) == 1 and given[0] > 0 else sorted(set(given))
    if not found or min(found) < 0 or max(found) >= depth:
        raise InputError(
            f"{kind!r} names no layers of this model, which has {depth}: give `features` such as layers=4 or layers=2,5"
        )
    return found
