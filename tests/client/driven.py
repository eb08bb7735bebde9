"""Both clients for one test: the asynchronous one driven by a loop of its own, so that it reads like the other."""

import asyncio
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from retinaserve_client import Answer, AsyncClient, Client

MakeClient = Callable[..., Any]
"""Arguments of `Client` → a context manager with its methods."""


class Driven:
    """`AsyncClient` with the methods of `Client`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self._runner.run(getattr(self._client, name)(*arguments, **options))

    def detect_many(self, *arguments: Any, **options: Any) -> Iterator[Answer | Exception]:
        answers = self._client.detect_many(*arguments, **options)
        return self._in_turn(answers)

    def _in_turn(self, answers: Any) -> Iterator[Answer | Exception]:
        try:
            while True:
                yield self._runner.run(anext(answers))
        except StopAsyncIteration:
            pass
        finally:
            self._runner.run(answers.aclose())


CLIENTS: dict[str, MakeClient] = {"Client": Client, "AsyncClient": Driven}
