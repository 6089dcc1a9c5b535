"""Mirrors blobs and journal to targets, sweeps, evicts, restores and delivers events.

The only package with asyncio. It meets the gateway in the catalog and nowhere else.
Nothing is here yet: it comes with the mirror.
"""
