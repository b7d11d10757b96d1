"""The batch's parameters as a numbered SQL table `a` (`json_to_recordset`): one form of a statement
serves one caller and many.

The table is one JSON value. With an array for each column (`unnest`) asyncpg would judge every item
of every array, and a list could not be a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import get_args, get_type_hints

import orjson

_TYPES: dict[object, str] = {
    str: "text",
    int: "bigint",
    bool: "boolean",
    datetime: "timestamptz",
    tuple[str, ...]: "text[]",
    dict[str, str]: "jsonb",
}


class BatchInput:
    """The input of a statement. `row`, a NamedTuple, is the input of one caller.

    `table`, for a FROM, has the fields of `row` as columns, and `number`: the caller's place in the
    batch. It reads the statement's first parameter, which `encode` makes.
    """

    def __init__(self, row: type[tuple[object, ...]]) -> None:
        types = {name: _sql_type(hint) for name, hint in get_type_hints(row).items()}
        self._names = ("number", *types)
        columns = ", ".join(map(" ".join, types.items()))
        self.table = f"json_to_recordset($1::text::json) a (number integer, {columns})"

    def encode(self, rows: Sequence[tuple[object, ...]]) -> str:
        """The statement's first parameter."""
        numbered = [
            dict(zip(self._names, (number, *values), strict=True))
            for number, values in enumerate(rows)
        ]
        return orjson.dumps(numbered).decode()


def _sql_type(hint: object) -> str:
    """The SQL type of a field; an optional field has the type of its values."""
    return (
        _TYPES.get(hint) or _TYPES[next(kind for kind in get_args(hint) if kind is not type(None))]
    )
