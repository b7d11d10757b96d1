"""Helpers of tests: the software authenticator, clients of each dialect, servers and processes."""
