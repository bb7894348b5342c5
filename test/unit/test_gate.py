"""The gate, with real sockets: who waits, who is let in, who is forgotten."""

import asyncio
import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).resolve().parents[2] / "synapse/nginx/files/gate.py"
REQUEST, ANSWER = b"POST / HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture
def gate(monkeypatch):
    spec = importlib.util.spec_from_file_location("gate", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def is_coming(unit):
        return unit == "coming.service"

    # There need be no systemd where this runs.
    monkeypatch.setattr(module, "is_coming", is_coming)
    return module


class Place:
    """A gate, and a process that comes when it is told to; what that was asked."""

    def __init__(self, gate, directory, unit="coming.service", longest=60):
        self.gate = gate.Gate(unit, str(directory / "process.sock"), longest)
        self.path, self.asked = str(directory / "gate.sock"), []

    async def __aenter__(self):
        self.servers = [await asyncio.start_unix_server(self.gate.serve, self.path)]
        return self

    async def __aexit__(self, *_):
        for server in self.servers:
            server.close()
        await self.until(lambda: not self.gate.guests)

    async def process_comes(self):
        async def answer(reader, writer):
            self.asked.append(await reader.read(1000))
            writer.write(ANSWER)
            writer.close()

        self.servers.append(await asyncio.start_unix_server(answer, self.gate.path))

    async def guest(self):
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(REQUEST)
        return reader, writer

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)


def test_who_waits_is_answered_when_the_process_comes(gate, tmp_path):
    async def run():
        async with Place(gate, tmp_path) as place:
            reader, writer = await place.guest()
            await asyncio.sleep(0.2)
            await place.process_comes()
            assert await reader.read() == ANSWER
            writer.close()
            assert place.asked == [REQUEST]

    asyncio.run(run())


def test_who_has_left_is_forgotten(gate, tmp_path):
    """A request that is tried again would otherwise be done twice."""

    async def run():
        async with Place(gate, tmp_path) as place:
            _, writer = await place.guest()
            await place.until(lambda: place.gate.guests)
            writer.close()
            await place.until(lambda: not place.gate.guests)
            await place.process_comes()
            reader, writer = await place.guest()
            assert await reader.read() == ANSWER
            writer.close()
            assert place.asked == [REQUEST]

    asyncio.run(run())


@pytest.mark.parametrize("options", [{"unit": "stopped.service"}, {"longest": 0.2}], ids=["nobody comes", "too long"])
def test_who_waits_in_vain_is_refused(gate, tmp_path, options):
    async def run():
        async with Place(gate, tmp_path, **options) as place:
            reader, _ = await place.guest()
            assert await reader.read() == b""

    asyncio.run(run())
