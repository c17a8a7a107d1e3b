"""Files appear whole or not at all."""
import pytest

from bitspike.writing import whole_file, write_json, write_text


def names(folder):
    return [p.name for p in folder.iterdir()]


def test_a_file_takes_the_old_ones_place_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_data_that_is_not_plain_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": [1]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "deep" / "a.json", {"a": object()})
    assert (tmp_path / "deep" / "a.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'


def test_two_writers_at_once_each_write_a_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"one")
        second.write(b"two")
        write_text(path, "three")
        assert path.read_text() == "three"
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="missing"):
        write_text(tmp_path / "missing" / "a", "")
