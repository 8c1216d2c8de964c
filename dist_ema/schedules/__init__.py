"""Schedules: the momentum of an update as a pure function of its number. docs/schedules.md tells which to choose."""
