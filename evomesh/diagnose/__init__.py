"""Preflight: what could stop a run, or make it wrong, is found before it starts.

Each rank states facts (``facts.py``, ``folders.py``, ``groups.py``), rank 0 judges those
of all ranks (``results.py``), and ``doctor.py`` says in which order. ``parity`` trains
the config in small, in its layout and in one process, and compares every tensor.
"""
