"""Wiring into training frameworks."""
