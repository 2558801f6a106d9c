"""A guest's RAM as a run asks for it: measured, opened for locking, digested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hostupdate.core import ram
from hostupdate.host import processes

#: Pages read by a sampled digest of one guest: 16 MiB, a few milliseconds, whatever its size.
SAMPLE_PAGES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RamSizes:
    """One guest's RAM, in bytes, all its blocks together."""

    ram_bytes: int
    resident_bytes: int
    swapped_bytes: int


class Memory:
    """Guests' RAM. ``verify_ram``: sample or full."""

    def __init__(self, verify_ram: str) -> None:
        self._sample_pages = 0 if verify_ram == "full" else SAMPLE_PAGES

    def measure(self, pid: int) -> RamSizes:
        """CoreError where the process is gone."""
        mappings = ram.mappings(pid)
        return RamSizes(
            ram_bytes=sum(mapping.length_bytes for mapping in mappings),
            resident_bytes=sum(mapping.resident_bytes for mapping in mappings),
            swapped_bytes=sum(mapping.swapped_bytes for mapping in mappings),
        )

    def open_shared(self, pid: int) -> list[int]:
        """Descriptors of the files behind the guest's shared RAM; the caller closes them."""
        return [ram.open_mapping(pid, mapping) for mapping in ram.mappings(pid) if mapping.shared]

    def prepare_digest(self, pid: int) -> Callable[[], tuple[str, int]]:
        """Looks the RAM blocks up now; the call that is returned reads them: (hex, pages)."""
        mappings = ram.mappings(pid)

        def digest() -> tuple[str, int]:
            value = ram.digest_guest(pid, mappings, sample_pages=self._sample_pages)
            return value.hex, value.pages

        return digest

    def major_faults(self, pid: int) -> int:
        """Major faults of the guest's QEMU so far; OSError where it is gone."""
        return processes.major_faults(pid)
