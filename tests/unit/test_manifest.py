"""The manifest: what it decodes to, and what each mistake in it is answered with."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostupdate.config import convert, decode_config
from hostupdate.errors import InputError
from hostupdate.manifest import Manifest, Packages, Step, Update, decode_manifest
from hostupdate.model import Phase

DOCS = Path(__file__).parents[2] / "docs"

UPDATE = '[update]\nname = "ovs"\n'
STEP = '[[step]]\nname = "one"\nphase = "stage"\nrun = ["true"]\n'
SECOND = '[[step]]\nname = "two"\nphase = "blackout"\nrun = ["true"]\n'


def refusal(text: str | bytes) -> InputError:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InputError) as caught:
        decode_manifest(data, "ovs.toml")
    assert str(caught.value).startswith("ovs.toml: ")
    assert caught.value.source == "ovs.toml"
    assert caught.value.problem and caught.value.remedy
    return caught.value


def test_the_whole_format() -> None:
    manifest = decode_manifest(
        b"""
        [update]
        name = "openvswitch-3.5"
        description = "the new switch"
        impact = "pause"
        budget = "5s"
        [packages]
        upgrade = ["openvswitch-switch", "libc6:amd64"]
        [[step]]
        name = "restart vswitchd"
        phase = "blackout"
        run = ["systemctl", "restart", "openvswitch-switch"]
        undo = ["systemctl", "start", "openvswitch-switch"]
        timeout = "4s"
        verify = ["ovs-vsctl", "show"]
        [[step]]
        name = "clean"
        phase = "finish"
        run = ["true"]
        """,
        "ovs.toml",
    )
    restart = Step(
        name="restart vswitchd",
        phase=Phase.BLACKOUT,
        run=("systemctl", "restart", "openvswitch-switch"),
        undo=("systemctl", "start", "openvswitch-switch"),
        timeout_ns=4_000_000_000,
        verify=("ovs-vsctl", "show"),
    )
    clean = Step(name="clean", phase=Phase.FINISH, run=("true",))
    assert manifest == Manifest(
        update=Update(
            name="openvswitch-3.5",
            description="the new switch",
            impact="pause",
            budget_ns=5_000_000_000,
        ),
        packages=Packages(upgrade=("openvswitch-switch", "libc6:amd64")),
        steps=(restart, clean),
    )
    assert manifest.steps_in(Phase.BLACKOUT) == (restart,)
    assert manifest.steps_in(Phase.STAGE) == ()


def test_what_may_be_left_out() -> None:
    manifest = decode_manifest((UPDATE + STEP).encode(), "ovs.toml")
    assert manifest.update == Update(name="ovs")
    assert manifest.update.impact == "auto" and manifest.update.budget_ns is None
    assert not manifest.update.reboot_only and manifest.packages is None
    (step,) = manifest.steps
    assert (step.undo, step.timeout_ns, step.verify) == (None, None, None)


def test_packages_alone_are_an_update() -> None:
    manifest = decode_manifest((UPDATE + "[packages]\nall = true\n").encode(), "ovs.toml")
    assert manifest.packages == Packages(all=True) and manifest.steps == ()


def test_a_manifest_is_frozen() -> None:
    manifest = decode_manifest((UPDATE + STEP).encode(), "ovs.toml")
    with pytest.raises(AttributeError):
        manifest.update.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("budget", UPDATE + 'budget = "30s"\n' + STEP),
        ("blackout step", UPDATE + SECOND + 'timeout = "30s"\n'),
        ("other step", UPDATE + STEP + 'timeout = "1h"\n'),
    ],
)
def test_limits_are_inclusive(limit: str, text: str) -> None:
    decode_manifest(text.encode(), "ovs.toml")


LONG_NAME = "n" * 101
BUDGET = 'a duration of more than 0 and at most 30 s, e.g. "5s"'
NAME = "a name of 1 to 100 characters without control characters"
IMPACTS = 'one of "auto", "handover", "kexec", "none", "pause"'


@pytest.mark.parametrize(
    ("text", "field", "problem", "remedy"),
    [
        # the whole
        ("", "update", "missing", "a table [update]"),
        (UPDATE, "", "the manifest is empty", "add a [[step]], [packages] or [qemu]"),
        ("update = 3", "update", "3 is not a table [update]", "a table [update]"),
        ("[[update]]", "update", "a list of 1 is not a table [update]", "a table [update]"),
        (STEP, "update", "missing", "a table [update]"),
        (
            UPDATE + STEP.replace("[[step]]", "[[steps]]"),
            "steps",
            'unknown key "steps"',
            "did you mean step? valid keys: update, packages, qemu, step",
        ),
        # [update]
        ("[update]\n" + STEP, "update.name", "missing", NAME),
        ('[update]\nname = ""\n', "update.name", '"" is not ' + NAME, "restart vswitchd"),
        ('[update]\nname = "  "\n', "update.name", '"  " is not ' + NAME, NAME),
        (f'[update]\nname = "{LONG_NAME}"\n', "update.name", '"nnnnnn', NAME),
        ('[update]\nname = "a\\nb"\n', "update.name", '"a\\nb" is not', NAME),
        ('[update]\nname = "\\u001b[2J"\n', "update.name", '"\\u001b[2J" is not', NAME),
        ("[update]\nname = 7\n", "update.name", "7 is not " + NAME, NAME),
        (
            UPDATE + 'describtion = "x"\n',
            "update.describtion",
            'unknown key "describtion"',
            "did you mean description? valid keys: name, description, reboot-only, impact, budget",
        ),
        (UPDATE + '"a\\nb" = 1\n', 'update."a\\nb"', 'unknown key "a\\nb"', "valid keys"),
        (UPDATE + "reboot_only = true\n", "update.reboot_only", "unknown key", "reboot-only?"),
        (UPDATE + "reboot-only = 1\n", "update.reboot-only", "1 is not true or false", "true or"),
        (UPDATE + 'impact = "reboot"\n', "update.impact", f'"reboot" is not {IMPACTS}', IMPACTS),
        (UPDATE + "impact = 1\n", "update.impact", f"1 is not {IMPACTS}", IMPACTS),
        (UPDATE + 'budget = "5"\n', "update.budget", '"5" has no unit', 'write a unit, e.g. "5s"'),
        (UPDATE + "budget = 5\n", "update.budget", "5 has no unit", 'write a unit, e.g. "5s"'),
        (UPDATE + "budget = 1.5\n", "update.budget", "1.5 has no unit", "write a unit"),
        (UPDATE + "budget = nan\n", "update.budget", "nan is not a duration", "5s"),
        (UPDATE + "budget = true\n", "update.budget", "true is not a duration", BUDGET),
        (UPDATE + 'budget = ["5s"]\n', "update.budget", "a list of 1 is not a duration", BUDGET),
        (UPDATE + 'budget = "0s"\n', "update.budget", '"0s" is not a duration of more', BUDGET),
        (UPDATE + 'budget = "-5s"\n', "update.budget", '"-5s" is negative', "without a sign"),
        (UPDATE + 'budget = "30.1s"\n', "update.budget", '"30.1s" is not a duration', BUDGET),
        # [packages]
        (UPDATE + "[packages]\n", "packages", "names no package", "all = true"),
        (UPDATE + "[packages]\nupgrade = []\n", "packages", "names no package", 'upgrade = ["'),
        (
            UPDATE + '[packages]\nupgrade = "qemu"\n',
            "packages.upgrade",
            '"qemu" is not a list of package names',
            '["openvswitch-switch"]',
        ),
        (
            UPDATE + '[packages]\nupgrade = ["qemu", "--purge"]\n',
            "packages.upgrade[2]",
            '"--purge" is not a package name',
            "a package name",
        ),
        (
            UPDATE + '[packages]\nupgrade = ["qemu"]\nall = true\n',
            "packages.all",
            "true, but packages.upgrade lists qemu",
            "keep one of the two",
        ),
        # [[step]]
        (UPDATE + "[step]\n", "step", "a table is not a list of tables", "written as [[step]]"),
        ("step = [3]\n" + UPDATE, "step[1]", "3 is not a table", "a table"),
        (UPDATE + "[[step]]\n", "step[1].name", "missing", NAME),
        (
            UPDATE + '[[step]]\nname = "one"\nphase = "stage"\n',
            "step[1].run",
            'missing (step "one")',
            '["systemctl", "restart", "openvswitch-switch"]',
        ),
        (
            UPDATE + '[[step]]\nname = "one"\nrun = ["true"]\n',
            "step[1].phase",
            'missing (step "one")',
            'one of "stage", "blackout", "finish"',
        ),
        (
            UPDATE + STEP.replace("stage", "staging"),
            "step[1].phase",
            '"staging" is not one of "stage", "blackout", "finish" (step "one")',
            'e.g. "blackout"',
        ),
        (
            UPDATE + STEP.replace('["true"]', '"systemctl restart x"'),
            "step[1].run",
            '"systemctl restart x" is not a list of a program and its arguments (step "one")',
            '["systemctl", "restart", "openvswitch-switch"]',
        ),
        (UPDATE + STEP.replace('"true"', ""), "step[1].run", "a list of 0 is not", "a program"),
        (UPDATE + STEP.replace('"true"', '"a", ""'), "step[1].run[2]", '"" is not', "not empty"),
        (UPDATE + STEP.replace('"true"', "4"), "step[1].run[1]", "4 is not a text", "a text"),
        (
            UPDATE + STEP + 'undo = ["a", "b\\u0000"]\n',
            "step[1].undo[2]",
            '"b\\u0000" is not a text that is not empty and has no NUL (step "one")',
            "no NUL",
        ),
        (UPDATE + STEP + "verify = []\n", "step[1].verify", "a list of 0 is not", "a program"),
        (
            UPDATE + STEP + SECOND + 'timout = "4s"\n',
            "step[2].timout",
            'unknown key "timout" (step "two")',
            "did you mean timeout? valid keys: name, phase, run, undo, timeout, verify",
        ),
        (
            UPDATE + STEP + SECOND + "timeout = 4\n",
            "step[2].timeout",
            '4 has no unit (step "two")',
            'write a unit, e.g. "5s"',
        ),
        (
            UPDATE + SECOND + 'timeout = "31s"\n',
            "step[1].timeout",
            '31 s is more than a blackout may last (step "two")',
            "at most 30 s, or move the step",
        ),
        (
            UPDATE + STEP + 'timeout = "2h"\n',
            "step[1].timeout",
            '"2h" is not a duration of more than 0 and at most 1 h (step "one")',
            "at most 1 h",
        ),
        (UPDATE + STEP + 'timeout = "0s"\n', "step[1].timeout", '"0s" is not', "more than 0"),
        (
            UPDATE + STEP + SECOND + STEP,
            "step[3].name",
            '"one" is also the name of step[1]',
            "a name of its own",
        ),
        # not even TOML
        (
            UPDATE + STEP + "timeout = 5s\n",
            "",
            'after a statement (at line 7, column 12): "timeout = 5s"',
            'written in quotes, e.g. timeout = "5s"',
        ),
        ("[update\n", "", '(at line 1, column 8): "[update"', "correct the line"),
        ("a = '''", "", "not valid TOML", "correct the line"),
        (UPDATE + 'name = "y"\n', "", "(at line 3, column 11)", "correct the line"),
        (b'[update]\nname = "\xff"\n', "", "line 2: byte 0xff is not UTF-8", "as UTF-8"),
        ("a = " + "[" * 5000, "", "not readable as TOML", "simplify"),
        ("a = " + "9" * 5000, "", "not readable as TOML", "simplify"),
        (b"#" * (1 << 20) + b"#", "", "more than 1048576 bytes", "the right file"),
    ],
)
def test_each_mistake_is_named(text: str | bytes, field: str, problem: str, remedy: str) -> None:
    error = refusal(text)
    assert error.field == field
    assert problem in error.problem
    assert remedy in error.remedy


@given(st.text(max_size=200))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    for document in (text, UPDATE + STEP + text):
        try:
            decode_manifest(document.encode(errors="surrogatepass"), "any.toml")
        except InputError as error:
            assert "\n" not in str(error) and error.remedy


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = ["update", "packages", "step", "name", "run", "timeout", "budget", "upgrade", "phase"]


@given(st.dictionaries(st.sampled_from(KEYS[:3]), st.dictionaries(st.sampled_from(KEYS), VALUES)))
def test_any_shape_is_decoded_or_refused(document: dict[str, object]) -> None:
    for shape in (document, {**document, "step": [document.get("step", 0)]}):
        try:
            convert(shape, Manifest, "any.toml")
        except InputError as error:
            assert error.field and error.problem and error.remedy


@pytest.mark.parametrize("page", ["manifest.md", "configuration.md"])
def test_every_toml_block_of_the_pages_decodes(page: str) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        if page == "manifest.md":
            decode_manifest(block.encode(), page)
        else:
            decode_config([(page, block.encode())])


def test_the_page_names_every_key() -> None:
    page = (DOCS / "manifest.md").read_text()
    for table in (Update, Packages, Step):
        for field in msgspec.structs.fields(table):
            assert f"`{field.encode_name}`" in page
