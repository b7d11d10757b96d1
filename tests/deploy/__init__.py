"""Tests of the files in `deploy/`: each is used as an operator uses it."""
