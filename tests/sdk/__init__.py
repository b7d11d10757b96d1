"""What the tests of the vendors' own SDKs need: their npm packages, pages, and the sites that use
them.
"""
