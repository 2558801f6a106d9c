"""The ways to put a new QEMU under a guest, by the name that a record has of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hostupdate.handover.own_saving import OwnSaving
from hostupdate.handover.ports import Host, Way
from hostupdate.handover.saving import Saving

WAYS: Mapping[str, Callable[[Host], Way]] = {Saving.name: Saving, OwnSaving.name: OwnSaving}
