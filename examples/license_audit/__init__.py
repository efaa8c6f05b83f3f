"""Audits the licences of the installed distributions: an agent in plain Python that survives `kill -9`."""
