"""Load on one HTTP endpoint from a process of its own, cheap enough to share two cores with the server.

    python benchmarks/load_generator.py URL BODIES --seconds 10 (--rate 100 | --concurrency 32)

BODIES holds a JSON body a line. `--rate`: open loop, requests are sent at random moments of that mean rate whether or
not the ones before were answered, and a latency counts from the moment at which its request was due. `--concurrency`:
closed loop, so many connections ask without a pause. Prints one line of JSON: requests, answered (200), statuses,
seconds, per_second, p50_ms, p95_ms, p99_ms, max_ms.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 30


@dataclass
class Tally:
    """What came of the requests."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def report(self, seconds: float) -> dict[str, object]:
        """The line that is printed."""
        ordered = sorted(self.latencies)

        def percentile(share: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 2) if ordered else 0.0

        return {
            "requests": sum(self.statuses.values()), "answered": self.statuses["200"], "statuses": dict(self.statuses),
            "seconds": round(seconds, 2), "per_second": round(self.statuses["200"] / seconds, 1),
            "p50_ms": percentile(0.5), "p95_ms": percentile(0.95), "p99_ms": percentile(0.99),
            "max_ms": percentile(1),
        }  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection that is kept open: one request at a time, the answer read by its Content-Length."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._status: asyncio.Future[str] | None = None
        self._is_last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lowered = head.lower()
        at = lowered.find(b"content-length:")
        length = int(lowered[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(body) >= length and self._status is not None and not self._status.done():
            self._received = b""
            self._is_last = b"\r\nconnection: close" in lowered
            self._status.set_result(head[9:12].decode())

    def connection_lost(self, _error: Exception | None) -> None:
        """See asyncio."""
        self._transport = None
        if self._status is not None and not self._status.done():
            self._status.set_result("connection lost")

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._is_last

    def close(self) -> None:
        """Ends it."""
        if self._transport is not None:
            self._transport.close()

    async def ask(self, request: bytes) -> str:
        """The status of the answer, or what went wrong."""
        assert self._transport is not None
        self._status = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._status
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()
            return "timeout"


class Client:
    """Sends requests over connections that are free, and opens more when there are none."""

    def __init__(self, url: str, bodies: list[bytes], headers: list[str]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        head += "".join(f"{header}\r\n" for header in headers)
        self._requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._free: list[Connection] = []
        self.tally = Tally()

    async def ask(self, number: int, due: float) -> str:
        """Sends one request and notes what came of it: a status, or what went wrong."""
        while self._free and not self._free[-1].is_open:  # the server closed it meanwhile
            self._free.pop()
        try:
            connection = self._free.pop() if self._free else await self._connect()
            status = await connection.ask(self._requests[number % len(self._requests)])
        except OSError as error:
            self.tally.statuses[type(error).__name__] += 1
            return type(error).__name__
        self.tally.statuses[status] += 1
        if status == "200":
            self.tally.latencies.append(time.perf_counter() - due)
        if connection.is_open:
            self._free.append(connection)
        else:
            connection.close()
        return status

    async def close(self) -> None:
        """Ends the connections, none of which is waiting for an answer."""
        for connection in self._free:
            connection.close()
        await asyncio.sleep(0)

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


async def open_loop(client: Client, rate: float, seconds: float) -> float:
    """Requests at random moments of a mean rate; the seconds until the last was answered."""
    moments = random.Random(0)
    began = due = time.perf_counter()
    tasks = set()
    number = 0
    while due < began + seconds:
        due += moments.expovariate(rate)
        await asyncio.sleep(max(0, due - time.perf_counter()))
        task = asyncio.create_task(client.ask(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    return time.perf_counter() - began


async def closed_loop(client: Client, concurrency: int, seconds: float) -> float:
    """So many askers without a pause."""
    began = time.perf_counter()

    async def ask(first: int) -> None:
        number = first
        while time.perf_counter() < began + seconds:
            await client.ask(number, time.perf_counter())
            number += concurrency

    await asyncio.gather(*(ask(first) for first in range(concurrency)))
    return time.perf_counter() - began


def main() -> None:
    """Runs the load and prints its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--header", action="append", default=[], help="such as 'Authorization: Bearer KEY'")
    arguments = parser.parse_args()

    async def run() -> dict[str, object]:
        client = Client(arguments.url, arguments.bodies.read_bytes().splitlines(), arguments.header)
        if arguments.rate:
            seconds = await open_loop(client, arguments.rate, arguments.seconds)
        else:
            seconds = await closed_loop(client, arguments.concurrency, arguments.seconds)
        return client.tally.report(seconds)

    json.dump(asyncio.run(run()), sys.stdout)
    print()


if __name__ == "__main__":
    main()
