"""Tests in a real Chromium: `chromium.py` is the driver, `pages/` holds fixture pages."""
