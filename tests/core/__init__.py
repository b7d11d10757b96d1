"""Tests of what knows no HTTP: model, ceremonies, tokens, and the verbs."""
