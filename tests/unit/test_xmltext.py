"""Where elements stand in a text, as another parser sees them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostupdate.xmltext import edited, places


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<a/>", {"a": "<a/>"}),
        ("<a><b/></a>", {"a": "<a><b/></a>", "a/b": "<b/>"}),
        ("<a><a/></a>", {"a": "<a><a/></a>", "a/a": "<a/>"}),
        ("<a></a>", {"a": "<a></a>"}),
        ("<a x='/'></a>", {"a": "<a x='/'></a>"}),
        ("<a x='>/>'  /> ", {"a": "<a x='>/>'  />"}),
        ("<a>/></a>", {"a": "<a>/></a>"}),
        ("<a><!--/></a>--></a >", {"a": "<a><!--/></a>--></a >"}),
        ("<a><?x /></a>?></a>", {"a": "<a><?x /></a>?></a>"}),
        ("<a><![CDATA[/>]]></a>", {"a": "<a><![CDATA[/>]]></a>"}),
        ("<a>é<b>ü</b></a>", {"a": "<a>é<b>ü</b></a>", "a/b": "<b>ü</b>"}),
    ],
)
def test_an_element_is_all_of_it(text: str, parts: dict[str, str]) -> None:
    content = text.encode()
    assert {p.path: content[p.start : p.end].decode() for p in places(content)} == parts


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> str:
    name = draw(st.sampled_from("ab"))
    attribute = draw(st.sampled_from(["", " x='/'", ' x=">"']))
    inner = draw(st.lists(st.sampled_from(["", "/>", "é", "<!-- </a> -->", "&lt;"]), max_size=2))
    if depth:
        inner += draw(st.lists(elements(depth - 1), max_size=2))
    text = "".join(inner)
    closed = draw(st.booleans()) and not text
    return f"<{name}{attribute}/>" if closed else f"<{name}{attribute}>{text}</{name}>"


@given(elements())
def test_any_element_is_one_by_itself(text: str) -> None:
    content = text.encode()
    found = places(content)
    tree = list(ET.fromstring(text).iter())
    assert len(found) == len(tree)
    for place, element in zip(found, tree, strict=True):
        alone = ET.fromstring(content[place.start : place.end])
        alone.tail = element.tail
        assert ET.tostring(alone) == ET.tostring(element)


def test_edits_leave_all_else() -> None:
    assert edited(b"0123456", [(5, 6, b"x"), (1, 3, b""), (4, 4, b"new")]) == b"03new4x6"


@pytest.mark.parametrize("text", ["", "<a>", "<a></b>", "text"])
def test_what_is_no_xml(text: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        places(text.encode())
