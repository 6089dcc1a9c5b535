"""Benchmarks of single operations, and tests of the bench itself."""
