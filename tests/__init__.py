"""Tests by seam, with real parts: a folder for each layer of the broker. `support` has helpers."""
