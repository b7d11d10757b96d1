"""Vendors' wire formats. A dialect only translates: parse the vendor's body, call one verb, render the vendor's answer.

Each module offers `PATHS` (a pattern of the paths that are its own: what goes wrong there is told in its shape), `routes` (for a port
that serves keyed callers, pages, or both) and `render` (a refusal in its shape; it gets the request, too). `broker.app` lists the modules; README.md holds the glossary and every deviation.
"""

from __future__ import annotations
