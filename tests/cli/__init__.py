"""Tests of the command line: commands, settings, `dev`, `serve`."""
