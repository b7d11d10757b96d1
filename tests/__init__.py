"""Tests: one file per module, real parts; `browser/` drives a real Chromium."""
