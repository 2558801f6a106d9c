"""The host itself: processes, cgroups, the steps of an update, what is installed."""
