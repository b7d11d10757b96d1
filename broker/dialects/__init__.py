"""Vendors' wire formats. A dialect only translates: parse the vendor's body, call one verb, render the vendor's answer.

Each module offers `PREFIX` (the path it answers under), `routes` (for a port that serves keyed callers, pages, or both) and
`render` (a refusal in its shape; it gets the request, too). `broker.app` lists the modules; README.md holds the glossary and every deviation.
"""

from __future__ import annotations
