"""An S3 server on this machine, behind a TCP proxy that delays every request; in processes of their own."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def delayed_s3(latency_s: float) -> Iterator[str]:
    """Address of moto's server behind the proxy; the environment leads clients there."""
    server, proxy = (_free_port() for _ in range(2))
    commands = [
        ["-m", "moto.server", "-p", str(server)],
        ["-m", "benchmarks.store.s3", str(proxy), str(server), str(latency_s)],
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([sys.executable, *command], **quiet) for command in commands]  # type: ignore[call-overload]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    endpoint = f"http://127.0.0.1:{proxy}"
    os.environ.update(keys, AWS_ENDPOINT_URL=endpoint)
    try:
        for port in (server, proxy):
            _wait_for(port)
        yield endpoint
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


async def _serve(port: int, server: int, latency_s: float) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", server)
        await asyncio.gather(pump(reader, ours, latency_s), pump(theirs, writer, 0))

    async with await asyncio.start_server(connect, "127.0.0.1", port, limit=1 << 20) as listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
