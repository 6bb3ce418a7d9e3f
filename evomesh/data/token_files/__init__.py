"""Read, write, verify and repair token files (``.bin``, ``.bin.meta``, ``.bin.json``)."""
