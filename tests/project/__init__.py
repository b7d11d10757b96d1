"""Tests of the repository: imports, documentation, examples, `make`, the wheel, the benchmark."""
