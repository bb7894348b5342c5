#!/usr/bin/python3 -IS
"""
Holds requests for a Synapse process that is about to be back.

nginx comes here when a process that has no peer takes no connection. systemd hands over the sockets that this program
listens on (sd_listen_fds(3)), each DIRECTORY/gate/NAME.sock, for the process whose own is DIRECTORY/public/NAME.sock. A
connection waits until the process takes it. It is refused at once when systemd neither runs the process nor is about to.
When nobody has come for a while, the program ends, and systemd starts it for the next one.
"""

import asyncio
import contextlib
import os
import pathlib
import socket

FIRST_DESCRIPTOR = 3
LONGEST_WAIT = 60
IDLE = 30
PAUSE = 0.05


async def is_coming(unit):
    """Whether systemd runs a unit, or is at work on it. Between the halves of a restart, it has nothing but a job."""
    command = ["systemctl", "show", "--property=ActiveState,Job", unit]
    asked = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    shown = dict(line.split("=", 1) for line in (await asked.communicate())[0].decode().split())
    return shown.get("ActiveState") not in ("inactive", "failed") or shown.get("Job", "0") not in ("", "0")


def connect(path):
    """A connection to a process, or None. At a Unix socket it is made at once or not at all."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        connection.connect(str(path))
        return connection
    except OSError:
        connection.close()
        return None


class Gate:
    """Before one process. All who wait here share one look at it."""

    def __init__(self, path):
        self.unit = f"{path.stem}.service"
        self.process = path.parents[1] / "public" / path.name
        self.looking = None
        self.guests = 0

    async def look(self):
        """Return whether the process takes connections, once it does or is known not to come."""
        while await is_coming(self.unit):
            if connection := connect(self.process):
                connection.close()
                return True
            await asyncio.sleep(PAUSE)
        return False

    async def enter(self):
        """Return a connection to the process; None if it does not come."""
        while not (connection := connect(self.process)):
            if self.looking is None or self.looking.done():
                self.looking = asyncio.create_task(self.look())
            if not await asyncio.shield(self.looking):
                return None
        return connection

    @contextlib.contextmanager
    def guest(self, writer):
        self.guests += 1
        try:
            yield
        finally:
            self.guests -= 1
            writer.close()

    async def serve(self, reader, writer):
        with self.guest(writer), contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT):
                connection = await self.enter()
            if connection:
                inner_reader, inner_writer = await asyncio.open_unix_connection(sock=connection)
                with contextlib.closing(inner_writer):
                    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))


async def copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def main():
    count = int(os.environ.get("LISTEN_FDS", "0"))
    listeners = [socket.socket(fileno=FIRST_DESCRIPTOR + number) for number in range(count)]
    gates = [Gate(pathlib.Path(listener.getsockname())) for listener in listeners]
    servers = [
        await asyncio.start_unix_server(gate.serve, sock=listener)
        for gate, listener in zip(gates, listeners, strict=True)
    ]

    async def nobody_is_here(pause):
        await asyncio.sleep(pause)
        while any(gate.guests for gate in gates):
            await asyncio.sleep(pause)

    await nobody_is_here(IDLE)
    # Who is in the queue waits for the next run; who was let in is served by this one.
    for server in servers:
        server.close()
    await nobody_is_here(PAUSE)


if __name__ == "__main__":
    asyncio.run(main())
