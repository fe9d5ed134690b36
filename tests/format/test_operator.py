"""The table of operators: all twelve combinations, with inputs in the order of the format."""

from vitoats.format.operator import INT8_OPERATORS


def test_every_combination_is_an_operator():
    assert set(INT8_OPERATORS) == {
        *("SparseMatMulInt8", "SparseMatMulInt8Gelu", "SparseMatMulInt8Add"),
        *("MatMulInt8", "MatMulInt8Gelu", "MatMulInt8Add"),
        *("LayerNormSparseMatMulInt8", "LayerNormSparseMatMulInt8Gelu", "LayerNormSparseMatMulInt8Add"),
        *("LayerNormMatMulInt8", "LayerNormMatMulInt8Gelu", "LayerNormMatMulInt8Add"),
    }


def test_inputs_of_the_longest():
    assert INT8_OPERATORS["LayerNormSparseMatMulInt8Add"].inputs == (
        *("x", "norm_weight", "norm_bias", "values", "mask", "scale", "bias", "U", "U_scale", "V", "V_scale", "residual"),
    )
    assert INT8_OPERATORS["LayerNormSparseMatMulInt8Add"].attributes == ("in_features", "epsilon")
    assert INT8_OPERATORS["MatMulInt8"].inputs == ("x", "weight", "scale", "bias")
