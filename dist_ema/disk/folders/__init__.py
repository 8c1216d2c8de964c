"""Folders that are whole or not there, also while other jobs read or write them. Local files only."""
