#!/usr/bin/env python3
"""A real bridge, to a network that consists of this process only.

    bridge.py CONFIG.json

Invite the bot into a room, then:

    POST /remote/messages  {"room": "!id", "from": "alice", "text": "hello"}   she says it in the room
    GET  /remote/messages  what was said in the rooms, as the remote network got it

Before it calls itself ready, it asks the homeserver once who it is, and has the homeserver reach it. If
either fails it exits at once, and waits for nothing: systemd starts it when the homeserver answers.
"""

import asyncio
import json
import logging
import os
import pathlib
import signal
import socket
import sys

from aiohttp import web
from mautrix.appservice import AppService
from mautrix.errors import MatrixError, MUnknownToken
from mautrix.types import EventType, Membership


class Bridge:
    def __init__(self, config):
        registration = config["registration"]
        self.config = config
        self.received = []
        self.appservice = AppService(
            server=config["homeserver"],
            domain=config["server_name"],
            as_token=registration["as_token"],
            hs_token=registration["hs_token"],
            bot_localpart=registration["sender_localpart"],
            id=registration["id"],
        )
        self.appservice.matrix_event_handler(self.from_matrix)
        self.appservice.app.router.add_post("/remote/messages", self.from_remote)
        self.appservice.app.router.add_get("/remote/messages", self.to_remote)

    def ghost(self, name):
        return f"@{self.config['registration']['id']}_{name}:{self.config['server_name']}"

    def is_ours(self, user):
        return user == self.appservice.bot_mxid or user.startswith(self.ghost("").partition(":")[0])

    async def from_matrix(self, event):
        if event.type == EventType.ROOM_MEMBER and event.state_key == self.appservice.bot_mxid:
            if event.content.membership == Membership.INVITE:
                await self.appservice.intent.join_room_by_id(event.room_id)
        elif event.type == EventType.ROOM_MESSAGE and not self.is_ours(event.sender):
            message = {"room": event.room_id, "from": event.sender, "text": event.content.body}
            self.received.append(message)

    async def from_remote(self, request):
        message = await request.json()
        intent = self.appservice.intent.user(self.ghost(message["from"]))
        try:
            await intent.ensure_joined(message["room"], bot=self.appservice.intent)
            event_id = await intent.send_text(message["room"], message["text"])
        except MatrixError as error:
            return web.json_response({"error": str(error)}, status=502)
        return web.json_response({"event_id": event_id})

    async def to_remote(self, _request):
        return web.json_response(self.received)

    async def run(self):
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self.appservice.start(*self.config["listen"])
        try:
            me = await self.appservice.intent.whoami()
            await self.appservice.intent.ensure_registered()
            await self.appservice.ping_self()
            logging.info("ready, as %s", me.user_id)
            notify("READY=1")
            await stop.wait()
        finally:
            await self.appservice.stop()


def notify(state):
    """sd_notify(3)"""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def main():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    config = json.loads(pathlib.Path(sys.argv[1]).read_text())

    async def bridge():
        await Bridge(config).run()

    try:
        asyncio.run(bridge())
    except MUnknownToken as error:
        sys.exit(f"M_UNKNOWN_TOKEN: the homeserver does not know this as_token (any more): {error}")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
