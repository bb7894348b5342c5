#!/usr/bin/python3 -IS
"""
Holds requests for a Synapse process that is about to be back: gate UNIT SOCKET SECONDS

nginx comes here when no process that could answer takes a connection. systemd hands over the socket that this program
listens on (sd_listen_fds(3)). A connection waits until the process takes it at its own SOCKET, for SECONDS at most. It is
refused when systemd neither runs the process's UNIT nor is about to. When nobody has come for a while, the program ends, and
systemd starts it for the next.
"""

import asyncio
import contextlib
import select
import socket
import sys

FIRST_DESCRIPTOR = 3
# Seconds
IDLE = 30
PAUSE = 0.05
BETWEEN_QUESTIONS = 1


async def is_coming(unit):
    """Whether systemd runs a unit, or is at work on it. Between the halves of a restart, it has nothing but a job."""
    command = ["systemctl", "show", "--property=ActiveState,Job", unit]
    asked = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    shown = dict(line.split("=", 1) for line in (await asked.communicate())[0].decode().split())
    return shown.get("ActiveState", "failed") not in ("inactive", "failed") or shown.get("Job", "0") not in ("", "0")


def connect(path):
    """A connection to a process, or None. At a Unix socket it is made at once or not at all."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        connection.connect(path)
        return connection
    except OSError:
        connection.close()
        return None


def has_left(guest):
    """Whether nginx has closed a connection, as it does when its client does: nobody wants the answer any more."""
    asked = select.poll()
    asked.register(guest, select.POLLRDHUP)
    return bool(asked.poll(0))


class Gate:
    """Before one process. All who wait here share what systemd says of it."""

    def __init__(self, unit, path, longest):
        self.unit, self.path, self.longest = unit, path, longest
        self.guests = 0
        self.asked, self.coming = float("-inf"), None

    async def enter(self, guest):
        """Return a connection to the process for a guest's; None if it does not come, or if the guest leaves."""
        while not (connection := connect(self.path)):
            now = asyncio.get_running_loop().time()
            if now - self.asked > BETWEEN_QUESTIONS:
                self.asked, self.coming = now, asyncio.create_task(is_coming(self.unit))
            if not await asyncio.shield(self.coming):
                return None
            await asyncio.sleep(PAUSE)
            if has_left(guest):
                return None
        return connection

    async def serve(self, reader, writer):
        self.guests += 1
        try:
            async with asyncio.timeout(self.longest):
                connection = await self.enter(writer.get_extra_info("socket"))
            if connection:
                inner_reader, inner_writer = await asyncio.open_unix_connection(sock=connection)
                with contextlib.closing(inner_writer):
                    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()
            self.guests -= 1

    async def nobody_is_here(self, pause):
        await asyncio.sleep(pause)
        while self.guests:
            await asyncio.sleep(pause)


async def copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def main(unit, path, longest):
    gate, listener = Gate(unit, path, float(longest)), socket.socket(fileno=FIRST_DESCRIPTOR)
    server = await asyncio.start_server(gate.serve, sock=listener, backlog=socket.SOMAXCONN)
    await gate.nobody_is_here(IDLE)
    # Who is in the queue waits for the next run; who was let in is served by this one.
    server.close()
    await gate.nobody_is_here(PAUSE)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
