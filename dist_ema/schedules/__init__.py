"""Schedules: the momentum of an update is a pure function of its number. docs/schedules.md compares them."""
