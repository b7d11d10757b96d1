"""Tests of the HTTP server: bytes, routes, keys, origins; and of the demo."""
