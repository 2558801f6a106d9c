"""The phases of a run, and their undo. Given its hands; knows no libvirt and no /proc."""

from hostupdate.engine.ports import Hands
from hostupdate.engine.run import Run

__all__ = ("Hands", "Run")
