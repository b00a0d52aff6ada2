"""PyTorch's .bin and .pt files, read without running anything that they say.

Such a file is a zip archive: data.pkl is a pickle that describes a dict of tensors, data/KEY are their bytes. A pickle
is a program for a small machine that can call any function of Python. Here a machine of our own runs it: it knows only
the instructions that PyTorch writes, and the names that they call stand for plain records (`CALLS`, `STORAGES`).
Neither torch nor the `pickle` module's machine is used, and every size is compared with the archive's before anything
is allocated.
"""

from __future__ import annotations

import math
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsteer.io.safetensors_file import AXES_LIMIT
from jaxsteer.io.stored import Index, Read, Stored, read_part, size
from jaxsteer.io.zip_file import LOCAL, Member, open_zip

PICKLE_LIMIT = 1 << 22  # bytes; ten thousand tensors take about a million and a half
STACK_LIMIT = 10_000  # values; PyTorch sets a thousand items of a dict at a time
TUPLE_LIMIT = 2  # levels: a tensor's arguments, and the shape among them
STORAGES: dict[str, tuple[str, np.dtype]] = {
    "torch DoubleStorage": ("F64", np.dtype("<f8")),
    "torch FloatStorage": ("F32", np.dtype("<f4")),
    "torch HalfStorage": ("F16", np.dtype("<f2")),
    "torch BFloat16Storage": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "torch LongStorage": ("I64", np.dtype("<i8")),
    "torch IntStorage": ("I32", np.dtype("<i4")),
    "torch ShortStorage": ("I16", np.dtype("<i2")),
    "torch CharStorage": ("I8", np.dtype("i1")),
    "torch ByteStorage": ("U8", np.dtype("u1")),
    "torch BoolStorage": ("BOOL", np.dtype("?")),
}
"""The classes of tensors' bytes that a pickle may name, by what they hold."""


class _Global(NamedTuple):
    """A name that the pickle asks for, "module name"; nothing is imported."""

    name: str


class _Storage(NamedTuple):
    """The bytes of a tensor: a member of the archive."""

    form: str
    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage: shape and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a sequence of values on the stack begins."""


def open_pickle(path: Path) -> dict[str, Stored]:
    """Read what a .bin or .pt file of PyTorch says of its tensors; their bytes are read when their `read` is called.

    Args:
        path: a file that torch.save wrote of a dict of tensors, as of a module's state_dict.

    Raises:
        ValueError: the file does not exist, is damaged or of the form before PyTorch 1.6, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start != LOCAL:
            raise ValueError(_not_zip(start))
        members = open_zip(path)
        root = _root(members)
        _check_order(path, members, root)
        tensors = _tensors(_read(path, members[f"{root}data.pkl"], PICKLE_LIMIT))
        return {name: _stored(path, name, tensor, members, root) for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a file") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as tensors of PyTorch: {error}") from None


def _not_zip(start: bytes) -> str:
    """What to do with a file that is no zip archive."""
    if start[:1] == b"\x80":
        return (
            "it is a plain pickle, as PyTorch wrote before 1.6, which may carry code. If you trust it, rewrite it: "
            "python -c \"import torch; torch.save(torch.load('FILE', weights_only=True), 'FILE')\""
        )
    return "it is no zip archive. Was the download or the copy cut short?"


def _root(members: Mapping[str, Member]) -> str:
    """The folder within the archive that holds data.pkl, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in members if name.split("/")[-1] == "data.pkl"]
    if len(roots) != 1 or roots[0].count("/") > 1:
        raise ValueError("it does not hold one data.pkl; was it written by torch.save?")
    if f"{roots[0]}constants.pkl" in members:
        raise ValueError("it is a TorchScript program; save the state_dict of the module instead")
    return roots[0]


def _read(path: Path, member: Member, limit: int) -> bytes:
    """The bytes of a small member."""
    if member.size > limit:
        raise ValueError(f"its description of tensors has {member.size} bytes; at most {limit} are read")
    with open(path, "rb") as file:
        file.seek(member.begin)
        return file.read(member.size)


def _check_order(path: Path, members: Mapping[str, Member], root: str) -> None:
    """Refuse files of machines that store the highest byte first."""
    name = f"{root}byteorder"
    if name in members and (order := _read(path, members[name], 100)) != b"little":
        raise ValueError(f"its byte order is {order[:20]!r}; only little-endian files are read")


def _tensors(pickled: bytes) -> dict[str, _Tensor]:
    """Run the pickle, which must come to a dict of tensors."""
    result = _Machine().run(pickled)
    if not isinstance(result, dict):
        raise ValueError(f"it holds {_kind(result)}, expected a dict from names to tensors")
    for name, value in result.items():
        if not isinstance(value, _Tensor):
            raise ValueError(f"{reprlib.repr(name)} is {_kind(value)}, expected a tensor")
    return result


def _kind(value: Any) -> str:
    """A value in a message."""
    return {dict: "a dict", tuple: "a tuple", _Tensor: "a tensor", _Global: "a name"}.get(
        type(value), reprlib.repr(value)
    )


def _depth(value: Any) -> int:
    """Levels of tuples; those within are as deep as they may be at most."""
    return 1 + max(map(_depth, value), default=0) if type(value) is tuple else 0


def _whole(value: Any) -> bool:
    """Whether a value is a number of elements."""
    return type(value) is int and value >= 0


def _numbers(value: Any) -> bool:
    """Whether a value is a tuple of them, one for each axis."""
    return isinstance(value, tuple) and len(value) <= AXES_LIMIT and all(map(_whole, value))


def _ordered_dict(*pairs: Any) -> dict[str, Any]:
    """collections.OrderedDict, empty."""
    if pairs:
        raise ValueError("it makes an OrderedDict in an unusual way")
    return {}


def _tensor(*arguments: Any) -> _Tensor:
    """torch._utils._rebuild_tensor_v2: (storage, offset, shape, strides, requires_grad, hooks)."""
    storage, offset, shape, strides = arguments[:4] if len(arguments) in (6, 7) else (None,) * 4
    if not isinstance(storage, _Storage) or not _whole(offset) or not _numbers(shape) or not _numbers(strides):
        raise ValueError("it describes a tensor in an unusual way")
    if len(shape) != len(strides):
        raise ValueError(f"it describes a tensor of {len(shape)} axes with {len(strides)} strides")
    return _Tensor(storage, offset, shape, strides)


def _parameter(*arguments: Any) -> _Tensor:
    """torch._utils._rebuild_parameter: (tensor, requires_grad, hooks)."""
    if len(arguments) != 3 or not isinstance(arguments[0], _Tensor):
        raise ValueError("it describes a parameter in an unusual way")
    return arguments[0]


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
"""The functions that a pickle may call, by what is done in their place."""

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE")
PUTS, GETS = ("BINPUT", "LONG_BINPUT", "MEMOIZE"), ("BINGET", "LONG_BINGET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Runs the instructions of a pickle on plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """What the pickle leaves on the stack."""
        for opcode, argument, at in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self.pop()
            try:
                self.step(opcode.name, argument)
                if len(self.stack) > STACK_LIMIT:
                    raise ValueError(f"it puts aside more than {STACK_LIMIT} values")
            except ValueError as error:
                raise ValueError(f"{error} (byte {at} of data.pkl)") from None
        raise ValueError("data.pkl does not end")

    def pop(self) -> Any:
        """The uppermost value."""
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise ValueError("data.pkl takes a value where there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """The values above the last mark."""
        values: list[Any] = []
        while self.stack and not isinstance(self.stack[-1], _Mark):
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("data.pkl lacks a mark")
        self.stack.pop()
        return values[::-1]

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in NUMBERS or name in TEXTS:
            self.stack.append(argument)
        elif name in TUPLES:
            self.put_tuple([self.pop() for _ in range(TUPLES[name])][::-1])
        elif name in PUTS:
            value = self.pop()
            self.stack.append(value)
            self.memo[len(self.memo) if argument is None else argument] = value
        elif name in GETS:
            if argument not in self.memo:
                raise ValueError("data.pkl refers to what it has not made")
            self.stack.append(self.memo[argument])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses the instruction {name}, which no dict of tensors needs")

    def put_tuple(self, values: list[Any]) -> None:
        """Put a tuple."""
        result = tuple(values)
        if _depth(result) > TUPLE_LIMIT:
            raise ValueError(f"it nests tuples more than {TUPLE_LIMIT} levels deep")
        self.stack.append(result)

    def set_items(self, pairs: list[Any]) -> None:
        """Set [key, value, key, value, ...] in the dict on the stack."""
        target = self.pop()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("it sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"it has the key {reprlib.repr(key)}; expected a name")
            if key in target:
                raise ValueError(f"{reprlib.repr(key)} is given twice")
            target[key] = value
        self.stack.append(target)

    def name(self, text: str) -> None:
        """Put a name that may be called or that tells a storage's type."""
        if text not in CALLS and text not in STORAGES:
            raise ValueError(f"it asks for {reprlib.repr(text.replace(' ', '.'))}, which is not run")
        self.stack.append(_Global(text))

    def name_from_stack(self) -> None:
        """The same with module and name on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it asks for something that has no name")
        self.name(f"{module} {name}")

    def call(self) -> None:
        """Do what stands for the function on the stack."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or function.name not in CALLS or not isinstance(arguments, tuple):
            raise ValueError(f"it calls {_kind(function)}")
        self.stack.append(CALLS[function.name](*arguments))

    def build(self) -> None:
        """Drop the attributes of a dict, such as a state_dict's versions of modules."""
        self.pop()
        if not self.stack or not isinstance(self.stack[-1], dict):
            raise ValueError("it sets attributes of what is no dict")

    def storage(self) -> None:
        """A storage from ("storage", its class, key, device, number of elements)."""
        given = self.pop()
        if not isinstance(given, tuple) or len(given) != 5 or given[0] != "storage":
            raise ValueError("it refers to something other than a tensor's bytes")
        kind, key, count = given[1], given[2], given[4]
        if not isinstance(kind, _Global) or kind.name not in STORAGES or not isinstance(key, str) or not _whole(count):
            raise ValueError("it describes a tensor's bytes in an unusual way")
        self.stack.append(_Storage(*STORAGES[kind.name], key, count))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.stack.append(_Mark()),
    "TUPLE": lambda machine, _: machine.put_tuple(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.name(argument),
    "STACK_GLOBAL": lambda machine, _: machine.name_from_stack(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}


def _stored(path: Path, name: str, tensor: _Tensor, members: Mapping[str, Member], root: str) -> Stored:
    """A tensor of the file, checked against the member that holds its bytes."""
    storage = tensor.storage
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise ValueError(f"the bytes of {reprlib.repr(name)}, data/{reprlib.repr(storage.key)[1:-1]}, are missing")
    if member.size != storage.length * storage.dtype.itemsize:
        raise ValueError(f"{reprlib.repr(name)}: {member.size} bytes are not {storage.length} values of {storage.form}")
    count = size(tensor.shape)
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    # A stride of 0 repeats values, so that a few bytes could claim to be a large tensor.
    if count and (tensor.offset + last >= storage.length or count > storage.length):
        raise ValueError(
            f"{reprlib.repr(name)} of shape {list(tensor.shape)} with strides {list(tensor.strides)} from element "
            f"{tensor.offset} on does not fit its {storage.length} values"
        )
    begin = member.begin + tensor.offset * storage.dtype.itemsize
    return Stored(tensor.shape, count * storage.dtype.itemsize, _reader(path, name, tensor, begin, last), storage.form)


def _reader(path: Path, name: str, tensor: _Tensor, begin: int, last: int) -> Read:
    """The `read` of a tensor whose elements lie between byte `begin` and `last` elements after it."""
    dtype, shape = tensor.storage.dtype, tensor.shape
    plain = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    def read(index: Index = ()) -> np.ndarray:
        if tensor.strides == plain or 0 in shape:
            return read_part(path, name, dtype, begin, shape, index)
        flat = read_part(path, name, dtype, begin, (last + 1,), ())
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, shape, strides)[index])

    return read
