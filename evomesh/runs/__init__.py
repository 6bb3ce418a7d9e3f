"""Runs after the fact: what their folders tell, as a page, beside another run, and computed again.

``read.py`` reads a run folder; ``times.py`` says where its time went; ``payload.py`` and
``page.py`` make a page of runs; ``watch.py`` serves it live; ``compare.py`` finds where
two runs part; ``replay.py`` computes a step again.
"""
