"""What makes an object act as an ndarray: operators, NumPy's functions, methods. All of it by way of a view.

Nothing here knows where the elements are: `NDArrayLike` asks for ``self[...]``, an ndarray onto all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dask_zbig.ahead import ALL, LAZY, SOME

__all__ = ["NDArrayLike"]

#: Of ndarray's attributes, those that an object of ours lacks, and what to do instead.
_INSTEAD = {
    # da.from_array calls copy() on whatever has one: it would read the whole array into memory
    "copy": "np.array(A) is a copy in memory; B = ZBigArray(A.shape, A.dtype); B[...] = A is another stored array",
    "base": "it owns its elements",
}

#: NumPy's functions that return views or look at shapes: bytes load when they are touched.
_OF_VIEWS = {
    "array_split", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_arrays", "broadcast_to", "can_cast",
    "common_type", "diagonal", "dsplit", "empty_like", "expand_dims", "flip", "fliplr", "flipud", "full_like", "hsplit",
    "imag", "iscomplexobj", "isrealobj", "matrix_transpose", "may_share_memory", "moveaxis", "ndim", "ones_like",
    "permute_dims", "ravel", "real", "reshape", "result_type", "rollaxis", "rot90", "shape", "shares_memory", "size",
    "split", "squeeze", "swapaxes", "transpose", "unstack", "vsplit", "zeros_like",
}  # fmt: skip
#: Those that may read all of an array, or just a bit of it.
_OF_PARTS = {
    "array2string", "array_repr", "array_str", "choose", "compress", "copyto", "extract", "fill_diagonal", "place",
    "put", "put_along_axis", "putmask", "searchsorted", "select", "take", "take_along_axis", "trace",
}  # fmt: skip


def _method(name: str, most: int = ALL) -> Callable[..., Any]:
    """`most`: how much may be fetched for it up front, see `dask_zbig.ahead`. What is lazy returns a view."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_viewed(a) for a in args)
        kwargs = {k: _viewed(v) for k, v in kwargs.items()}
        return getattr(self._values(most), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"As `numpy.ndarray.{name}`, of a view of all elements."
    return method


def _attribute(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self[...], name)

    get.__doc__ = f"As `numpy.ndarray.{name}`, of a view of all elements."
    return property(get)


class NDArrayLike(np.lib.mixins.NDArrayOperatorsMixin):
    """A mixin for classes with `shape`, `dtype` and ``__getitem__``.

    Operators and NumPy's functions take such an object as they take a view of all of it, ``A[...]``: what they
    return is an ndarray in memory, or a view where theirs is one (``A.T``, ``A.reshape(-1)``). ``A += 1`` and
    ``np.add(A, 1, out=A)`` change the elements in place. As ndarrays these objects cannot be hashed, and only one
    element can be taken for true or false.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        shape: tuple[int, ...]
        dtype: np.dtype[Any]

        def __getitem__(self, index: Any) -> Any: ...
        def __setitem__(self, index: Any, value: Any) -> None: ...

    def _values(self, most: int) -> npt.NDArray[Any]:
        """A view of all elements, to be read by the caller; `most`: see `dask_zbig.ahead`."""
        return self[...]  # type: ignore[no-any-return]

    # -- what it is

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; not what it takes on disk, which is less where nothing was written."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    # -- NumPy's protocols

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All of it as an ndarray: a view, unless another dtype or a copy is asked for.

        Who asks for it is likely to read it: unless a lot would have to be fetched from a server, it is brought here.
        """
        copied = copy or (dtype is not None and np.dtype(dtype) != self.dtype)
        return np.array(self._values(ALL if copied else SOME), dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Call the ufunc on views. What is left in the call decides who answers it: Dask's arrays do, say."""
        out = kwargs.get("out", ())
        most = SOME if method == "at" else ALL
        kwargs = {k: _viewed(v) for k, v in kwargs.items()}
        result = getattr(ufunc, method)(*(_viewed(i, most) for i in inputs), **kwargs)
        if not out:
            return result
        if isinstance(result, tuple):
            return tuple(r if o is None else o for r, o in zip(result, out, strict=True))
        return out[0]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The same for NumPy's functions, with those that change an argument, such as ``np.copyto``."""
        name = getattr(func, "__name__", "")
        most = LAZY if name in _OF_VIEWS else SOME if name in _OF_PARTS else ALL
        return func(*_viewed(args, most), **{k: _viewed(v, most) for k, v in kwargs.items()})

    # Of these the ufuncs can less than ndarrays: those compare fields and bytes, and numbers with strings, too.

    def __eq__(self, other: object) -> Any:
        return operator.eq(self._values(ALL), _viewed(other))

    def __ne__(self, other: object) -> Any:
        return operator.ne(self._values(ALL), _viewed(other))

    __hash__ = None  # type: ignore[assignment]

    # -- Python's protocols

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return operator.contains(self._values(ALL), _viewed(value))

    def __bool__(self) -> bool:
        if self.size > 1:  # (of which there may be no view)
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. Use a.any() or a.all()"
            )
        return bool(self._values(ALL))

    def __int__(self) -> int:
        return int(self._values(ALL))

    def __float__(self) -> float:
        return float(self._values(ALL))

    def __complex__(self) -> complex:
        return complex(self._values(ALL))

    def __index__(self) -> int:
        return self._values(ALL).__index__()

    def __bytes__(self) -> bytes:
        return bytes(self._values(ALL))  # (without this method they would be the elements, each as one byte)

    def __str__(self) -> str:
        try:
            return str(self._values(SOME))  # (of a large array NumPy reads just the corners)
        except MemoryError:
            return repr(self)

    def __format__(self, spec: str) -> str:
        return format(self._values(SOME), spec) if spec else str(self)

    def __getattr__(self, name: str) -> Any:
        text = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name in _INSTEAD:
            text += f": {_INSTEAD[name]}"
        elif not name.startswith("_") and hasattr(np.ndarray, name) and not hasattr(type(self), name):
            text += f", but its views do: A[...].{name}"
        raise AttributeError(text, name=name, obj=self)

    def fill(self, value: Any) -> None:
        """As `numpy.ndarray.fill`: set every element."""
        self[...] = value

    T = _attribute("T")
    mT = _attribute("mT")  # noqa: N815 - NumPy's name
    flat = _attribute("flat")
    flags = _attribute("flags")
    real = _attribute("real")
    imag = _attribute("imag")
    all = _method("all")
    any = _method("any")
    argmax = _method("argmax")
    argmin = _method("argmin")
    argpartition = _method("argpartition")
    argsort = _method("argsort")
    astype = _method("astype")
    byteswap = _method("byteswap")
    choose = _method("choose", SOME)
    clip = _method("clip")
    compress = _method("compress", SOME)
    conj = _method("conj")
    conjugate = _method("conjugate")
    cumprod = _method("cumprod")
    cumsum = _method("cumsum")
    diagonal = _method("diagonal", LAZY)
    dot = _method("dot")
    flatten = _method("flatten")
    item = _method("item", SOME)
    max = _method("max")
    mean = _method("mean")
    min = _method("min")
    nonzero = _method("nonzero")
    partition = _method("partition")
    prod = _method("prod")
    put = _method("put", SOME)
    ravel = _method("ravel", LAZY)
    repeat = _method("repeat")
    reshape = _method("reshape", LAZY)
    round = _method("round")
    searchsorted = _method("searchsorted", SOME)
    sort = _method("sort")
    squeeze = _method("squeeze", LAZY)
    std = _method("std")
    sum = _method("sum")
    swapaxes = _method("swapaxes", LAZY)
    take = _method("take", SOME)
    tobytes = _method("tobytes")
    tofile = _method("tofile")
    tolist = _method("tolist")
    trace = _method("trace", SOME)
    transpose = _method("transpose", LAZY)
    var = _method("var")
    view = _method("view", LAZY)


def _viewed(value: Any, most: int = ALL) -> Any:
    """`value` with views in place of objects of ours, also inside of lists, tuples and dicts."""
    if isinstance(value, NDArrayLike):
        return value._values(most)
    if type(value) in (list, tuple):
        return type(value)(_viewed(v, most) for v in value)
    if type(value) is dict:
        return {k: _viewed(v, most) for k, v in value.items()}
    return value
