"""Tests of the ephemeral and the durable store, on real servers."""
