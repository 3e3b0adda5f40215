"""The data types of the safetensors format (those of safetensors 0.8), and their names in torch and numpy.

Standard library only; torch and numpy are looked up by name where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One data type of the format.

    ``torch_name`` is an attribute of torch, ``numpy_name`` what ``numpy.dtype`` takes, ``ml_dtypes_name`` an attribute
    of the optional package ``ml_dtypes``, which gives numpy more types; each is empty where there is no such type.
    ``packed`` is how many elements torch stores in one of its own: 2 for ``float4_e2m1fn_x2``, else 1.
    """

    name: str
    bits: int
    torch_name: str = ""
    numpy_name: str = ""
    ml_dtypes_name: str = ""
    packed: int = 1

    @property
    def item_bytes(self) -> int:
        """Bytes of one element of the torch or numpy type; the alignment that it asks for."""
        return max(1, self.bits // 8)


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 8, "bool", "bool"),
        Dtype("U8", 8, "uint8", "uint8"),
        Dtype("I8", 8, "int8", "int8"),
        Dtype("F4", 4, "float4_e2m1fn_x2", packed=2),
        # Neither torch nor safetensors.torch has a type for six bits: their bytes are reached through Model.raw().
        Dtype("F6_E2M3", 6),
        Dtype("F6_E3M2", 6),
        Dtype("F8_E5M2", 8, "float8_e5m2", ml_dtypes_name="float8_e5m2"),
        Dtype("F8_E4M3", 8, "float8_e4m3fn", ml_dtypes_name="float8_e4m3fn"),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu", ml_dtypes_name="float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", ml_dtypes_name="float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", ml_dtypes_name="float8_e5m2fnuz"),
        Dtype("I16", 16, "int16", "int16"),
        Dtype("U16", 16, "uint16", "uint16"),
        Dtype("F16", 16, "float16", "float16"),
        Dtype("BF16", 16, "bfloat16", ml_dtypes_name="bfloat16"),
        Dtype("I32", 32, "int32", "int32"),
        Dtype("U32", 32, "uint32", "uint32"),
        Dtype("F32", 32, "float32", "float32"),
        Dtype("F64", 64, "float64", "float64"),
        Dtype("I64", 64, "int64", "int64"),
        Dtype("U64", 64, "uint64", "uint64"),
        Dtype("C64", 64, "complex64", "complex64"),
    )
}
"""Every data type of the format by its name in a header."""
