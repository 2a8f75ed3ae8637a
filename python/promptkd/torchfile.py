"""Files of torch.save, read without trust: tensors and plain data, nothing run, nothing imported.

The pickle inside is read by an unpickler that knows tensors and plain containers; every other
class becomes an inert placeholder, and a function, or anything of the standard library that is no
data type, is refused by its name.  Tensors are described by the pickle and read after it.
"""

from __future__ import annotations

import _compat_pickle
import collections
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptkd.errors import CheckpointError

_MAX_PICKLE_BYTES = 1 << 28  # the pickle beside the tensors: about 100 kB in real files
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
# Data types of the standard library, and classes and helpers with small initials, that a pickled
# scheduler or optimiser may name; all of them become placeholders like any other class.
_HARMLESS = {
    "argparse.Namespace",
    "builtins.bool", "builtins.bytearray", "builtins.bytes", "builtins.complex", "builtins.dict",
    "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.object",
    "builtins.range", "builtins.set", "builtins.slice", "builtins.str", "builtins.tuple",
    "_codecs.encode", "copyreg._reconstructor",
    "collections.Counter", "collections.defaultdict", "collections.deque",
    "datetime.date", "datetime.datetime", "datetime.timedelta",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath",
    "types.SimpleNamespace",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "torch.device", "torch.dtype",
}  # fmt: skip

# What zipfile raises for a damaged file.
_DAMAGE = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error
)  # fmt: skip


class _Frozen:
    """An object of ours inside a pickle: the pickle can't change it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("changes an object that it may not change")


class _StorageType(_Frozen):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Frozen):
    """Bytes of the archive that tensors lie in."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class TensorRef(_Frozen):
    """A tensor described, not read."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


class _Call(_Frozen):
    """One of torch's own functions for tensors, replaced by ours."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


class _Placeholder:
    """Stands for an object of a class that is no tensor: keeps nothing, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """What a pickled list does."""

    def extend(self, values: Any) -> None:
        """What a pickled list does."""

    def add(self, value: Any) -> None:
        """What a pickled set does."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    numbers = (offset, *shape, *stride)
    if (
        not isinstance(storage, _Storage)
        or not all(type(n) is int and n >= 0 for n in numbers)
        or len(shape) != len(stride)
    ):
        raise pickle.UnpicklingError("describes a tensor wrongly")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    count = math.prod(shape)
    if count > storage.numel or (count and last >= storage.numel):
        raise pickle.UnpicklingError("describes a tensor beyond its storage")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_typed(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    if not isinstance(function, _Call):
        raise pickle.UnpicklingError("describes a tensor wrongly")
    return function(*args)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
}


# The unpickler written in Python: a memo index in the C one can make it fill all memory.
class _Unpickler(pickle._Unpickler):
    """Finds tensors and dicts; makes placeholders for classes; refuses all else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.placeholders: dict[str, type[_Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`; nothing is imported."""
        # Protocol 2, which torch writes, has Python 2's names: "commands.Popen" is subprocess's.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in _CALLS:
            return _Call(_CALLS[full])
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if full not in _HARMLESS and not (module == "torch" and name in _DTYPES):
            foreign = module.partition(".")[0] not in sys.stdlib_module_names
            is_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
            if not (is_class and (foreign or module == "__main__")):
                raise pickle.UnpicklingError(f"calls '{full}'")
        return self.placeholders.setdefault(full, type("_Inert", (_Placeholder,), {}))

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", type, key, device, number of elements)."""
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, kind, key, _, numel = pid
            if isinstance(kind, _StorageType) and isinstance(key, str) and type(numel) is int:
                return _Storage(key, kind.dtype, numel)
        raise pickle.UnpicklingError("refers to something that is no tensor storage")


class TorchFile:
    """A file of torch.save: a zip of `data.pkl` and, stored as they are, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise CheckpointError(f"can't read '{path}': {reason}") from error
        except _DAMAGE as error:
            raise CheckpointError(
                f"'{path}' is no checkpoint of torch 1.6 or later, or it is cut short; it is not "
                "opened as a plain pickle, which could run anything"
            ) from error
        pickles = [n for n in self._zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"'{path}' is a zip file, but no checkpoint of torch.save")
        self._top = pickles[0].removesuffix("data.pkl")

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _read(self, name: str, limit: int) -> bytes:
        try:
            info = self._zip.getinfo(self._top + name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                raise CheckpointError(f"'{self.path}': '{name}' is packed or larger than it may be")
            data: bytes = self._zip.read(info)
        except (KeyError, OSError, *_DAMAGE) as error:
            raise CheckpointError(f"'{self.path}' is damaged at '{name}': {error}") from error
        return data

    def unpickle(self) -> tuple[Any, tuple[str, ...]]:
        """The pickled object without its tensors' values, and the classes left out of it."""
        if (
            f"{self._top}byteorder" in self._zip.namelist()
            and self._read("byteorder", 16) != b"little"
        ):
            raise CheckpointError(f"'{self.path}' was saved on a big-endian machine")
        unpickler = _Unpickler(self._read("data.pkl", _MAX_PICKLE_BYTES))
        try:
            return unpickler.load(), tuple(sorted(unpickler.placeholders))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"'{self.path}' is refused: its pickle {error}; a checkpoint needs tensors and "
                "plain data only, so don't load this file by other means"
            ) from error
        except (EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
                MemoryError, RecursionError) as error:  # fmt: skip
            raise CheckpointError(f"'{self.path}' has a damaged pickle: {error!r}") from error

    def tensor(self, name: str, ref: TensorRef) -> Tensor:
        """Read one tensor."""
        storage = ref.storage
        size = storage.numel * storage.dtype.itemsize
        data = self._read(f"data/{storage.key}", size)
        if len(data) != size:
            raise CheckpointError(
                f"'{self.path}' is damaged: {name} has {len(data)} of {size} bytes"
            )
        if not size:
            return torch.empty(ref.shape, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(ref.shape, ref.stride, ref.offset).clone()
