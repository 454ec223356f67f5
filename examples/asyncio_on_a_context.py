# SPDX-License-Identifier: Apache-2.0
"""An asyncio server whose requests are answered by coroutines of the event core, which wait for asyncio in turn."""

from __future__ import annotations

import asyncio

from bottomhalf.aio import CoMutex, sleep_ns
from bottomhalf.aio.asyncio_bridge import from_asyncio, run_in_aio
from bottomhalf.aio.asyncio_loop import AioEventLoop


async def look_up(question: str) -> str:
    """What an asyncio library would do: ask a database, fetch a page."""
    await asyncio.sleep(0.001)
    return question[::-1]


class Answers:
    """Served by coroutines of the event core."""

    def __init__(self) -> None:
        self._mutex = CoMutex("the answers")

    async def answer(self, question: str) -> str:
        async with self._mutex:
            await sleep_ns(100_000)
            return str(await from_asyncio(look_up(question)))


async def main() -> None:
    """One client, three questions."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, AioEventLoop)
    answers = Answers()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            answer = await run_in_aio(loop.context, answers.answer(line.decode().strip()))
            writer.write(f"{answer}\n".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for question in ("stressed", "drawer", "live"):
        writer.write(f"{question}\n".encode())
        print(question, "->", (await reader.readline()).decode().strip())
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=AioEventLoop) as runner:
        runner.run(main())
