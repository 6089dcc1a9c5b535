"""Tests of the gateway: values alone where that is enough, else a real gunicorn on loopback."""
