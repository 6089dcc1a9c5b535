"""Measures blobcask against the limits of the machine it runs on, both in one run.

May import every other package; nothing imports it.
"""
