"""Arrays from mapped bytes. numpy is imported when the first one is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cached_client.dtypes import DTYPES
from cached_client.errors import UnsupportedDtypeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cached_client.safetensors_header import TensorInfo


def array_from_view(view: memoryview, info: TensorInfo) -> npt.NDArray[Any]:
    """The array whose bytes are ``view``: zero-copy; it keeps the mapping alive, and a write stays private.

    numpy itself has no BF16 and no F8: with the package ``ml_dtypes`` installed they are arrays of its types, without
    it, and for F4 and F6, UnsupportedDtypeError is raised.
    """
    import numpy as np

    return np.frombuffer(view, dtype=_numpy_dtype(info)).reshape(info.shape)


def _numpy_dtype(info: TensorInfo) -> np.dtype[Any]:
    import numpy as np

    dtype = DTYPES[info.dtype]
    if dtype.numpy_name:
        return np.dtype(dtype.numpy_name)
    if dtype.ml_dtypes_name:
        try:
            found: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype.ml_dtypes_name))
        except (ImportError, AttributeError):
            hint = "use tensor(), or install ml_dtypes, which gives numpy this type"
        else:
            return found
    else:
        hint = "use tensor(), or raw() for its bytes as they are in the file"
    raise UnsupportedDtypeError(
        f"numpy has no type for {info.dtype}, the dtype of {info.name!r}",
        hint=hint,
        tensor=info.name,
        dtype=info.dtype,
    )
