"""Saved averages as they lie on disk. Local files only; no communication."""
