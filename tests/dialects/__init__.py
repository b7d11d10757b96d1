"""Tests of each dialect: its contract, its golden files, and what all dialects share."""
