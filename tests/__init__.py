"""The tests: a folder for each package, and one for each way to break a store."""
