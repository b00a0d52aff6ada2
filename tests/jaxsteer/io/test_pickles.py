"""PyTorch's files: read as torch wrote them; those that carry code or lie about sizes are refused, and nothing runs."""

import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from jaxsteer.io.pickles import open_pickle

MEMORY = 3_000_000


@pytest.fixture
def written(golden):
    return golden / "interop" / "pickles"


@pytest.mark.parametrize("name", ["protocol_2.bin", "protocol_4.bin"])
def test_tensors_that_torch_wrote(written, name):
    answers = np.load(written / "answers.npz")
    tensors = open_pickle(written / name)
    assert set(tensors) == set(answers.files) - {"ids"}
    assert {key: tensor.form for key, tensor in tensors.items()} == {
        "f32": "F32",
        "f64": "F64",
        "f16": "F16",
        "bf16": "BF16",
        "i64": "I64",
        "bool": "BOOL",
        "transposed": "F32",
        "part": "F32",
        "empty": "F32",
        "parameter": "F32",
    }
    for key, tensor in tensors.items():
        assert tensor.shape == answers[key].shape
        np.testing.assert_array_equal(tensor.read().astype(np.float32), answers[key])


def test_parts_of_tensors(written):
    tensors, index = open_pickle(written / "protocol_2.bin"), (slice(1, 3), slice(2, 4))
    for key in ("f32", "transposed"):
        np.testing.assert_array_equal(tensors[key].read(index), tensors[key].read()[index])


def test_a_file_of_the_old_form_is_refused_with_how_to_convert_it(written):
    with pytest.raises(ValueError, match=r"legacy\.bin: .*before 1\.6.*weights_only=True"):
        open_pickle(written / "legacy.bin")


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def called(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def tensor(key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), kind="torch FloatStorage"):
    storage = b"(" + text("storage") + called(kind) + text(key) + text("cpu") + number(count) + b"tQ"
    made = called("torch._utils _rebuild_tensor_v2") + b"(" + storage + number(offset) + numbers(shape)
    return made + numbers(strides) + b"\x89" + called("collections OrderedDict") + b")RtR"


def state(*items):
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items) + b"u."


def archive(path, pickled, data=bytes(24), compression=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", data)
        for name, value in more:
            file.writestr(name, value)
    return path


def refused(path, words):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as error:
            open_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert path.name in str(error.value)
    assert len(str(error.value)) < 1000


def test_what_these_tests_write_is_read(tmp_path):
    data = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "x.bin", state(("w", tensor()), ("t", tensor(shape=(3, 2), strides=(1, 3)))), data)
    tensors = open_pickle(path)
    np.testing.assert_array_equal(tensors["w"].read(), data.reshape(2, 3))
    np.testing.assert_array_equal(tensors["t"].read(), data.reshape(2, 3).T)


class Runs:
    """Runs a function of the caller's when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark):
    """Pickles that create the file `mark` when Python's pickle reads them, or that try other doors."""
    import os
    import pathlib

    touch = text(f"touch {mark}")
    return {
        "os.system": pickle.dumps({"w": Runs(os.system, f"touch {mark}")}, 2),
        "protocol 5": pickle.dumps({"w": Runs(os.system, f"touch {mark}")}, 5),
        "a path": pickle.dumps({"w": Runs(pathlib.Path(mark).touch)}, 4),
        "exec": state(("w", called("builtins exec") + text(f"open({str(mark)!r}, 'w')") + b"\x85R")),
        "INST": state(("w", b"(" + touch + b"ios\nsystem\n")),
        "OBJ": state(("w", b"(" + called("os system") + touch + b"o")),
        "NEWOBJ": state(("w", called("os system") + touch + b"\x85\x81")),
        "STACK_GLOBAL": state(("w", text("os") + text("system") + b"\x93" + touch + b"\x85R")),
        "a dotted name": state(("w", called("torch._utils _rebuild_tensor_v2.__globals__") + b")R")),
        "attributes of a function": b"\x80\x02"
        + called("torch._utils _rebuild_tensor_v2")
        + b"}"
        + text("a")
        + b"Nsb.",
        "attributes of a tensor": b"\x80\x02}" + text("w") + tensor() + b"}bs.",
        "EXT1": b"\x80\x02\x82\x01.",
        "a persistent id": state(("w", text("os.system") + b"Q")),
        "a storage of another kind": state(("w", tensor(kind="os system"))),
        "a call of a storage": state(("w", called("torch FloatStorage") + number(10**9) + b"\x85R")),
        "a call of a tensor": state(("w", tensor() + b")R")),
    }


@pytest.mark.parametrize("name", list(hostile("")))
def test_nothing_is_run(tmp_path, name):
    mark = tmp_path / "mark"
    refused(archive(tmp_path / "x.bin", hostile(mark)[name]), "cannot be read as tensors of PyTorch")
    assert not mark.exists()


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(hostile(tmp_path / "mark")["os.system"])
    refused(path, "plain pickle")
    assert not (tmp_path / "mark").exists()


PLACES = {
    "too large": {"count": 2**40},
    "another size": {"count": 5},
    "negative": {"count": -6},
    "a shape that does not fit": {"shape": (3, 3)},
    "a hundred gigabytes": {"shape": (2**20, 2**15), "strides": (2**15, 1)},
    "the same values again and again": {"shape": (2**20, 2**15), "strides": (0, 0)},
    "an offset": {"offset": 1},
    "an offset before it": {"offset": -1},
    "backwards": {"strides": (-3, 1)},
    "strides out of it": {"strides": (4, 1)},
    "strides of other axes": {"strides": (1,)},
    "many axes": {"shape": (1,) * 9, "strides": (1,) * 9},
    "huge numbers": {"shape": (2**62, 2**62), "strides": (2**62, 1)},
    "no such member": {"key": "1"},
    "a member elsewhere": {"key": "../data.pkl"},
    "a file of the machine": {"key": "/etc/passwd"},
    "another type": {"kind": "torch DoubleStorage"},
    "an unknown type": {"kind": "torch QInt8Storage"},
}


@pytest.mark.parametrize("name", list(PLACES))
def test_tensors_stay_within_their_bytes(tmp_path, name):
    refused(archive(tmp_path / "x.bin", state(("w", tensor(**PLACES[name])))), r"cannot be read as tensors of PyTorch")


SAID = {
    "no dict": (b"\x80\x02" + numbers([1]) + b".", "holds a tuple"),
    "no tensor": (state(("w", number(1))), "'w' is 1, expected a tensor"),
    "a dict in a dict": (state(("w", b"}")), "'w' is a dict"),
    "a number for a name": (b"\x80\x02}" + number(1) + tensor() + b"s.", "has the key 1"),
    "a name twice": (state(("w", tensor()), ("w", tensor())), "'w' is given twice"),
    "no end": (state(("w", tensor()))[:-1], "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "an empty stack": (b"\x80\x02.", "takes a value where there is none"),
    "no mark": (b"\x80\x02t.", "lacks a mark"),
    "an unknown memo": (b"\x80\x02h\x05.", "refers to what it has not made"),
    "a list": (b"\x80\x02].", "the instruction EMPTY_LIST"),
    "a huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "deep nesting": (b"\x80\x02)" + b"\x85" * 1_000_000 + b".", "nests tuples"),
    "tuples of tuples": (b"\x80\x02)" + b"q\0h\0h\0\x87" * 10_000 + b".", "nests tuples"),
    "a million dicts": (b"\x80\x02" + b"}" * 1_000_000 + b".", "more than 10000 values"),
    "a long claim": (b"\x80\x02X\xff\xff\xff\x7fw.", "cannot be read"),
    "a longer claim": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fw.", "cannot be read"),
    "a long number": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "cannot be read"),
    "a half of a pair": (b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "cannot be read|holds"),
}


@pytest.mark.parametrize("name", list(SAID))
def test_pickles_of_other_things(tmp_path, name):
    pickled, words = SAID[name]
    path = archive(tmp_path / "x.bin", pickled)
    if words is None:
        assert open_pickle(path) == {}
    else:
        refused(path, words)


def test_archives_that_do_not_come_from_torch(tmp_path):
    good, path = state(("w", tensor())), tmp_path / "x.bin"
    refused(archive(path, good, compression=zipfile.ZIP_DEFLATED), "is compressed")
    refused(archive(path, good, bytes(10**6), zipfile.ZIP_DEFLATED), "is compressed")
    for name in ("../evil", "x/../../evil", "/etc/evil", "x\\..\\evil"):
        refused(archive(path, good, more=[(name, b"")]), "points out of the archive")
    refused(archive(path, good, more=[("x/data/0", bytes(24))]), "'x/data/0' is given twice")
    refused(archive(path, good, more=[("y/data.pkl", good)]), "does not hold one data.pkl")
    refused(archive(path, good, more=[("x/constants.pkl", good)]), "TorchScript")
    refused(archive(path, good, more=[("x/byteorder", b"big")]), "byte order")
    refused(archive(path, bytes(1 << 22) + b"."), "at most 4194304")


def test_directories_that_lie(tmp_path):
    path = archive(tmp_path / "x.bin", state(("w", tensor())))
    whole = path.read_bytes()
    directory, end = whole.find(b"PK\x01\x02"), whole.rfind(b"PK\x05\x06")
    second = whole.find(b"PK\x01\x02", directory + 1)
    lies = {
        "a size of 4 GB": (second + 20, struct.pack("<II", 2**32 - 2, 2**32 - 2)),
        "a size in no zip64 field": (second + 20, struct.pack("<II", 2**32 - 1, 2**32 - 1)),
        "an offset of 4 GB": (second + 42, struct.pack("<I", 2**32 - 2)),
        "the other member's place": (second + 42, struct.pack("<I", 0)),
        "a long directory": (end + 12, struct.pack("<I", 2**32 - 2)),
        "a directory behind the end": (end + 16, struct.pack("<I", 2**32 - 2)),
        "zip64 without its record": (end + 16, struct.pack("<I", 2**32 - 1)),
        "more members": (end + 10, struct.pack("<H", 9)),
        "a long name": (second + 28, struct.pack("<H", 2**16 - 1)),
        "encryption": (second + 8, struct.pack("<H", 1)),
    }
    for at, value in lies.values():
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        refused(path, "cannot be read as tensors of PyTorch")
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read as tensors of PyTorch")


def test_a_hundred_gigabytes_by_zip64(tmp_path):
    """The sizes of both members are 100 GB, and the pickle agrees."""
    path = archive(tmp_path / "x.bin", state(("w", tensor(count=25 * 10**9, shape=(25 * 10**9,), strides=(1,)))))
    whole = path.read_bytes()
    second = whole.find(b"PK\x01\x02", whole.find(b"PK\x01\x02") + 1)
    extra = struct.pack("<HHQQ", 1, 16, 10**11, 10**11)
    entry = whole[second : second + 20] + b"\xff" * 8 + whole[second + 28 : second + 30] + struct.pack("<H", 20)
    name_end = second + 46 + struct.unpack_from("<H", whole, second + 28)[0]
    entry += whole[second + 32 : name_end] + extra
    end = whole.rfind(b"PK\x05\x06")
    length = struct.unpack_from("<I", whole, end + 12)[0] + 20
    tail = whole[end : end + 12] + struct.pack("<I", length) + whole[end + 16 :]
    path.write_bytes(whole[:second] + entry + whole[name_end:end] + tail)
    refused(path, "would end at byte 1000000")


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_pickle(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="is a folder"):
        open_pickle(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    refused(tmp_path / "x.bin", "no zip archive")
