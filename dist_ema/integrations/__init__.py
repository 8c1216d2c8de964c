"""Averages are wired into training frameworks here."""
