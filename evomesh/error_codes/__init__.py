"""Codes of errors and their meaning in English and Chinese: ``pages/*.toml``, one table for each code.

A code such as EVO-DATA-012 names a kind of error; several places may raise it. It never
gets another meaning: a kind that is no longer raised leaves a gap.
"""
