"""A guest's policy from libvirt metadata, in both forms that libvirt may hand out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostupdate.errors import InputError
from hostupdate.guestpolicy import MAX_CHARACTERS, NAMESPACE, GuestPolicy, decode_guest_policy

ALL = GuestPolicy(
    availability_set="web",
    update_domain=2,
    max_blackout_ns=5_000_000_000,
    needs_approval=True,
    fallback="save",
)


def guest(inner: str) -> str:
    """As libvirt hands it out: without the namespace."""
    return f"<guest>\n  {inner}\n</guest>"


def test_as_the_operator_writes_it() -> None:
    element = f"""<hu:guest xmlns:hu="{NAMESPACE}">
      <!-- one of two web servers -->
      <hu:availability-set>web</hu:availability-set>
      <hu:update-domain>2</hu:update-domain>
      <hu:max-blackout> 5s </hu:max-blackout>
      <hu:needs-approval>yes</hu:needs-approval>
      <hu:fallback>save</hu:fallback>
    </hu:guest>"""
    assert decode_guest_policy(element, "web1") == ALL


def test_as_libvirt_hands_it_out() -> None:
    # virsh -c test:///default "define ...; metadata g urn:hostupdate:guest:1", libvirt 9.0
    element = guest(
        "<availability-set>web</availability-set>\n  <update-domain>2</update-domain>\n"
        "  <max-blackout>5s</max-blackout>\n  <needs-approval>yes</needs-approval>\n"
        "  <fallback>save</fallback>"
    )
    assert decode_guest_policy(element, "web1") == ALL


def test_everything_is_optional() -> None:
    assert decode_guest_policy("<guest/>", "web1") == GuestPolicy()
    assert decode_guest_policy(guest("<needs-approval>no</needs-approval>"), "web1") == (
        GuestPolicy(needs_approval=False)
    )


@pytest.mark.parametrize(
    ("element", "field", "problem", "remedy"),
    [
        (
            guest("<max-blackuot>5s</max-blackuot>"),
            "max-blackuot",
            'unknown element "max-blackuot"',
            "did you mean max-blackout? valid elements: availability-set",
        ),
        (
            guest('<x:max-blackout xmlns:x="urn:x">5s</x:max-blackout>'),
            "{urn:x}max-blackout",
            'unknown element "{urn:x}max-blackout"',
            "valid elements",
        ),
        (
            guest('<x:y xmlns:x="a&#10;b">5s</x:y>'),
            "{a\\nb}y",
            'unknown element "{a\\nb}y"',
            "valid elements",
        ),
        (guest("<max-blackout>5</max-blackout>"), "max-blackout", '"5" has no unit', '"5s"'),
        (guest("<max-blackout>0s</max-blackout>"), "max-blackout", '"0s" is not', "more than 0"),
        (guest("<max-blackout>-1s</max-blackout>"), "max-blackout", '"-1s" is negative', "sign"),
        (guest("<max-blackout/>"), "max-blackout", '"" is not a duration', '"5s"'),
        (
            guest("<max-blackout>5s</max-blackout><max-blackout>6s</max-blackout>"),
            "max-blackout",
            "given twice",
            "keep one",
        ),
        (
            guest('<max-blackout unit="s">5</max-blackout>'),
            "max-blackout",
            "has more than a text",
            "<max-blackout>VALUE</max-blackout>",
        ),
        (guest("<fallback><save/></fallback>"), "fallback", "has more than a text", "VALUE"),
        (guest("<fallback>save</fallback>stray"), "fallback", "has more than a text", "VALUE"),
        (guest("<fallback>migrate</fallback>"), "fallback", '"migrate" is not one of', "shutdown"),
        (guest("<update-domain>-1</update-domain>"), "update-domain", '"-1" is not', "0 to 9999"),
        (guest("<update-domain>two</update-domain>"), "update-domain", '"two" is not', "0 to"),
        (guest("<update-domain>\u0662</update-domain>"), "update-domain", "is not a whole", "0 to"),
        (guest("<availability-set/>"), "availability-set", '"" is not a name', "1 to 100"),
        (
            guest("<availability-set>a\nb</availability-set>"),
            "availability-set",
            '"a\\nb" is not a name',
            "control characters",
        ),
        (guest("<needs-approval>true</needs-approval>"), "needs-approval", '"true" is not', "yes"),
        ("<guest>web</guest>", "guest", "has a text or an attribute", "elements in it only"),
        ('<guest a="1"/>', "guest", "has a text or an attribute", "elements in it only"),
        ("<host/>", "", 'the element is "host", not guest', "name it guest"),
        ('<guest xmlns="urn:x"/>', "", 'the element is "{urn:x}guest"', "name it guest"),
        ("<guest>", "", "not XML: no element found", "correct it"),
        ("", "", "not XML: no element found", "correct it"),
        (guest("&amp;&x;"), "", "not XML: undefined entity", "correct it"),
        ("<guest>\ud800</guest>", "", "not XML", "correct it"),
        ('<!DOCTYPE guest [<!ENTITY x "y">]><guest/>', "", "holds a DOCTYPE", "remove"),
        ('<!DOCTYPE guest SYSTEM "file:///etc/passwd"><guest/>', "", "holds a DOCTYPE", "remove"),
        (guest(" " * MAX_CHARACTERS), "", f"at most {MAX_CHARACTERS} are read", "shorten"),
    ],
)
def test_each_mistake_is_named(element: str, field: str, problem: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_guest_policy(element, "web 1")
    assert caught.value.source == 'metadata of guest "web 1"'
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    assert caught.value.remedy.endswith(f"virsh metadata 'web 1' {NAMESPACE} --key hu --edit")


@given(st.text(max_size=60))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    for element in (text, guest(text), guest(f"<availability-set>{text}</availability-set>")):
        try:
            decode_guest_policy(element, text)
        except InputError as error:
            assert "\n" not in str(error)
