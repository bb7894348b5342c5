"""
Files that are whole or as they were.
"""

import os
import stat

import pytest


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_file_is_whole_and_roots(minion, tmp_path, content):
    path = tmp_path / "file"
    path.write_text("before")
    minion.synapse_files.write(path, content, gid=os.getgid(), mode=0o640)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_stays_as_it_was(minion, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError):
        minion.synapse_files.write(path, None)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_link_in_the_place_of_the_draft_is_not_followed(minion, tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_text("somebody else's")
    (tmp_path / "file.new").symlink_to(other)
    minion.synapse_files.write(path, "text", gid=os.getgid())
    assert (path.read_text(), path.is_symlink()) == ("text", False)
    assert other.read_text() == "somebody else's"
