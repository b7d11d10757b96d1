"""Tests of the backend's client; and for tests of the vendors' own SDKs their npm packages, pages
and sites.
"""
