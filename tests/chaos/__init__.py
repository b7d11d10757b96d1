"""A history checker over real faults: see README.md."""
