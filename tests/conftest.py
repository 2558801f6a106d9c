"""For all tests."""

from hypothesis import settings

# A slow moment of a shared machine is not a defect.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
