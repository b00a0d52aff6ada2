"""Small files: what is written replaces the old file whole or not at all."""

import os

import pytest

from jaxsteer.io.files import read_json, replacing, write_json, write_text


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_text_is_written_whole(tmp_path, kind):
    path = tmp_path / "a.txt"
    for text in ("first\n", "π ≈ 3\n"):
        write_text(kind(path), text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_an_error_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail():
        with replacing(kind(path)) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_json_cannot_hold_is_not_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"loss": float("nan"), "steps": 3})
    assert read_json(str(path)) == {"loss": "NaN", "steps": 3}
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in ({1, 2}, deep):
        with pytest.raises(ValueError, match=r"a\.json: cannot be written as JSON"):
            write_json(path, {"x": value})
    assert read_json(path) == {"loss": "NaN", "steps": 3}
    with pytest.raises(ValueError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "a\\ud83dx", "\\ude00\\ud83d"])
def test_json_with_half_of_a_surrogate_pair_is_refused(tmp_path, half):
    path = tmp_path / "a.json"
    for text in (f'{{"x": "{half}"}}', f'{{"{half}": 1}}', f'{{"x": [1, {{"y": ["{half}"]}}]}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: not valid text: \\ud[8e][03][0d] is half of a surrogate pair"):
            read_json(path)
    path.write_text('{"x": "\\ud83d\\ude00 \\\\ud83d"}')
    assert read_json(path) == {"x": "\N{GRINNING FACE} \\ud83d"}
