"""Files of layouts: what is written is read, and what is not one is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshort.conversion.layout_file import FORMAT, read_layouts, write_layouts
from longshort.layout import HeadLayout

WINDOWS = st.lists(st.none() | st.integers(1, 10**6), min_size=1, max_size=4)
LAYOUTS = st.builds(
    lambda windows, group, sinks: HeadLayout(
        tuple(window for window in windows for _ in range(group)), len(windows), sinks
    ),
    WINDOWS,
    st.integers(1, 3),
    st.integers(0, 9),
)


@given(layouts=st.lists(st.none() | LAYOUTS, min_size=1, max_size=4))
def test_layouts_come_back(tmp_path_factory, layouts):
    path = tmp_path_factory.mktemp("layouts") / "layout.json"
    write_layouts(path, layouts, {"model": "somewhere"})
    assert read_layouts(path) == layouts
    assert json.loads(path.read_text())["model"] == "somewhere"


GOOD = {"windows": [4, None], "num_kv_heads": 2, "sink_tokens": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "got no JSON"),
        ("[]", "must have the format"),
        (json.dumps({"format": "other", "layouts": [GOOD]}), "must have the format"),
        (json.dumps({"format": FORMAT, "layouts": 3}), "must have the format"),
        (
            json.dumps({"format": FORMAT, "layouts": [None, {"windows": [1]}]}),
            "layer 1: must be null or have",
        ),
        (json.dumps({"format": FORMAT, "layouts": [GOOD | {"windows": [0]}]}), "layer 0: windows"),
        (json.dumps({"format": FORMAT, "layouts": [GOOD | {"sink_tokens": -1}]}), "layer 0: sink_tokens"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "layout.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_layouts(path)
