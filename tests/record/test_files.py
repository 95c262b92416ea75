"""Files of a run are read without trust."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.record.files import json_object, read_json


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, ""])
def test_what_is_no_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_object(text.encode())


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(Path("/dev/zero"))
