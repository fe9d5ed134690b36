"""GELU with its factors in the order that ONNX Runtime recognizes, so that it is fused into one node.

    y = x (0.5 (1 + erf(x / sqrt 2)))   ->   y = (x (1 + erf(x / sqrt 2))) 0.5

torch.onnx writes the first; ONNX Runtime's fusion looks for the second.
"""

from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.pattern import MatchResult


def _written_by_torch(op, x, sqrt2, one, half):
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, sqrt2)), one)))


def _known_to_onnx_runtime(op, x, sqrt2, one, half):
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, sqrt2)), one)), half)


def _check(context, x, sqrt2, one, half) -> MatchResult:
    result = MatchResult()
    for value in (sqrt2, one, half):
        if value.const_value is None or value.const_value.size != 1:
            return result.fail("a factor is no constant number", value)
    return result


gelu = RewriteRuleSet([RewriteRule(_written_by_torch, _known_to_onnx_runtime, _check)], commute=True)
