"""Tests that drive the pages in a real Chromium against a real server."""
