"""What a guest asks for, read from its libvirt metadata (docs/configuration.md, "Per guest").

The owner of the host writes it; it is checked as strictly as a file all the same, because a
misread limit would be exceeded without a word.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn
from xml.etree import ElementTree

from hostupdate.durations import DurationError, parse_duration, quoted
from hostupdate.errors import InputError

NAMESPACE = "urn:hostupdate:guest:1"
MAX_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPolicy:
    """A guest's wishes; ``GuestPolicy()`` is that of a guest without metadata.

    ``fallback`` says what may become of a guest that cannot be kept: ``refuse`` (the update does
    not happen), ``save`` or ``shutdown``.
    """

    availability_set: str | None = None
    update_domain: int | None = None
    max_blackout_ns: int | None = None
    needs_approval: bool | None = None
    fallback: str | None = None


def decode_guest_policy(element: str, guest: str) -> GuestPolicy:
    """The policy in ``element``, the XML of the metadata element, of the guest named ``guest``.

    libvirt hands the element out without its namespace although it stores it with it (in
    virXMLExtractNamespaceXML), so both are read. Raises InputError that names guest and element.
    """

    def refuse(field: str, problem: str, remedy: str) -> NoReturn:
        edit = f"virsh metadata {shlex.quote(guest)} {NAMESPACE} --key hu --edit"
        source = f"metadata of guest {quoted(guest)}"
        raise InputError(source, field, problem, remedy=f"{remedy}: {edit}")

    values: dict[str, str | int | bool] = {}
    for child in _parse(element, refuse):
        name = _local_name(child)
        if name not in _READERS:
            near = difflib.get_close_matches(name, _READERS, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            known = ", ".join(_READERS)
            shown = quoted(name)
            refuse(shown[1:-1], f"unknown element {shown}", f"{guess}valid elements: {known}")
        attribute = name.replace("-", "_").replace("max_blackout", "max_blackout_ns")
        if attribute in values:
            refuse(name, "given twice", "keep one of the two")
        if len(child) or child.attrib or (child.tail or "").strip():
            refuse(name, "has more than a text", f"write <{name}>VALUE</{name}>, nothing else")
        text = (child.text or "").strip()
        try:
            values[attribute] = _READERS[name](text)
        except DurationError as error:
            refuse(name, f"{quoted(text)} {error.problem}", error.remedy)
        except ValueError as error:
            refuse(name, f"{quoted(text)} is not {error}", f"write {error}")
    return GuestPolicy(**values)  # type: ignore[arg-type]


def _parse(element: str, refuse: Callable[[str, str, str], NoReturn]) -> ElementTree.Element:
    if len(element) > MAX_CHARACTERS:
        refuse("", f"{len(element)} characters, at most {MAX_CHARACTERS} are read", "shorten it")
    if "<!DOCTYPE" in element:  # nothing but a DOCTYPE can declare entities
        refuse("", "holds a DOCTYPE", "remove the DOCTYPE")
    try:
        root = ElementTree.fromstring(element)
    except (ElementTree.ParseError, ValueError) as error:  # ValueError: a lone surrogate
        refuse("", f"not XML: {error}", "correct it")
    if _local_name(root) != "guest":
        refuse("", f"the element is {quoted(_local_name(root))}, not guest", "name it guest")
    if (root.text or "").strip() or root.attrib:
        refuse("guest", "has a text or an attribute of its own", "write elements in it only")
    return root


def _local_name(element: ElementTree.Element) -> str:
    """The tag without our namespace; a foreign one stays on it, so that it is refused."""
    return element.tag.removeprefix(f"{{{NAMESPACE}}}")


def _set_name(text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,100}", text):
        raise ValueError("a name of 1 to 100 characters without control characters")
    return text


def _domain_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise ValueError("a whole number from 0 to 9999")
    return int(text)


def _blackout_ns(text: str) -> int:
    blackout_ns = parse_duration(text)
    if blackout_ns == 0:
        raise ValueError("a duration of more than 0, e.g. 5s")
    return blackout_ns


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _fallback(text: str) -> str:
    if text not in ("refuse", "save", "shutdown"):
        raise ValueError("one of refuse, save, shutdown")
    return text


_READERS: dict[str, Callable[[str], str | int | bool]] = {
    "availability-set": _set_name,
    "update-domain": _domain_number,
    "max-blackout": _blackout_ns,
    "needs-approval": _yes_or_no,
    "fallback": _fallback,
}
