"""Stand-ins for parts that are only told something, or asked for something plain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Part:
    """Writes down each call as `name.call` in a list that several of them share, and answers with what is given for that call.

    `answers` may be values, which are given as they are, or functions, which are called; those that are asynchronous are awaited by
    the caller, as are calls named in `awaited`. A call that nothing is given for answers None.
    """

    def __init__(self, name: str, told: list[str], *awaited: str, **answers: Any) -> None:
        self._name = name
        self._told = told
        self._awaited = awaited
        self._answers = answers

    def __getattr__(self, call: str) -> Callable[..., Any]:
        answer = self._answers.get(call)

        def given(*args: Any, **options: Any) -> Any:
            self._told.append(f"{self._name}.{call}")
            return answer(*args, **options) if callable(answer) else answer

        async def soon(*args: Any, **options: Any) -> Any:
            found = given(*args, **options)
            return await found if inspect.isawaitable(found) else found

        return soon if call in self._awaited else given
