"""Folders that are whole or not there, also while others read or write them. Local files only."""
