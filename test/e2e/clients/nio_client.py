"""
Two people with matrix-nio do what people do, in rooms of one version, and each sees what the other did.

    nio_client.py URL ROOM_VERSION USER_AGENT
"""

import asyncio
import io
import json
import secrets
import sys
from urllib.parse import quote

import nio
from nio.event_builders import EnableEncryptionBuilder, ToDeviceMessage
from nio.events.ephemeral import Receipt
from nio.store import SqliteMemoryStore


class Person(nio.AsyncClient):
    """A user who remembers all that a sync brought."""

    def __init__(self, url, name, agent):
        config = nio.AsyncClientConfig(
            store=SqliteMemoryStore, custom_headers={"User-Agent": agent}, max_limit_exceeded=0, max_timeouts=0
        )
        super().__init__(url, name, config=config)
        self.seen, self.news = [], asyncio.Event()
        for listen, kind in (
            (self.add_event_callback, nio.Event),
            (self.add_ephemeral_callback, nio.EphemeralEvent),
            (self.add_room_account_data_callback, nio.AccountDataEvent),
        ):
            listen(lambda _, event: self.notice(event), kind)
        for listen, kind in (
            (self.add_to_device_callback, nio.ToDeviceEvent),
            (self.add_presence_callback, nio.PresenceEvent),
            (self.add_global_account_data_callback, nio.AccountDataEvent),
        ):
            listen(self.notice, kind)

    def notice(self, event):
        self.seen += getattr(event, "receipts", [event])
        self.news.set()

    async def sees(self, kind, **fields):
        """Wait for an event of nio's class ``kind`` with these values."""
        wanted = fields.items()
        async with asyncio.timeout(30):
            while True:
                for event in self.seen:
                    if isinstance(event, kind) and all(getattr(event, name) == value for name, value in wanted):
                        return event
                self.news.clear()
                await self.news.wait()

    async def ask(self, method, path, body=None):
        """What nio has no function for, over its connection."""
        headers = {"Authorization": f"Bearer {self.access_token}", **self.config.custom_headers}
        answer = await self.send(method, f"/_matrix/client/{path}", json.dumps(body), headers)
        assert answer.status == 200, f"{method} {path}: {answer.status} {await answer.text()}"
        return await answer.json()


def good(answer):
    """The answer to a request, which is not an error."""
    assert not isinstance(answer, nio.ErrorResponse), answer
    return answer


async def register_and_log_in(url, agent):
    name, password = f"nio-{secrets.token_hex(6)}", secrets.token_hex(8)
    newcomer = Person(url, name, agent)
    good(await newcomer.register(name, password))
    good(await newcomer.logout())
    await newcomer.close()
    person = Person(url, name, agent)
    good(await person.login(password))
    good(await person.set_displayname(name.upper()))
    return person


async def meet(alice, bob, version, **kwargs):
    """A room of alice's that bob joined."""
    alice.seen.clear()  # what bob did in the room before
    created = good(await alice.room_create(room_version=version, invite=[bob.user_id], **kwargs))
    good(await bob.join(created.room_id))
    await alice.sees(nio.RoomMemberEvent, state_key=bob.user_id, membership="join")
    return created.room_id


async def talk(alice, bob, room):
    said = good(await alice.room_send(room, "m.room.message", {"msgtype": "m.text", "body": "good morning"}))
    await bob.sees(nio.RoomMessageText, event_id=said.event_id, body="good morning")

    relation = {"rel_type": "m.replace", "event_id": said.event_id}
    better = {"msgtype": "m.text", "body": "good evening"}
    good(await alice.room_send(room, "m.room.message", better | {"m.new_content": better, "m.relates_to": relation}))
    edit = await bob.sees(nio.RoomMessageText, body="good evening")
    assert edit.source["content"]["m.relates_to"] == relation

    good(await bob.room_typing(room, True, 20_000))
    await alice.sees(nio.TypingNoticeEvent, users=[bob.user_id])

    good(await bob.update_receipt_marker(room, said.event_id))
    await alice.sees(Receipt, event_id=said.event_id, user_id=bob.user_id)
    good(await bob.room_read_markers(room, edit.event_id, edit.event_id))
    await alice.sees(Receipt, event_id=edit.event_id, user_id=bob.user_id)
    await bob.sees(nio.FullyReadEvent, event_id=edit.event_id)

    history = good(await bob.room_messages(room))
    assert {said.event_id, edit.event_id} <= {event.event_id for event in history.chunk}


async def settings(alice, bob, room):
    good(await alice.set_presence("unavailable", "at lunch"))
    await bob.sees(nio.PresenceEvent, user_id=alice.user_id, status_msg="at lunch")
    assert good(await bob.get_presence(alice.user_id)).status_msg == "at lunch"

    good(await alice.to_device(ToDeviceMessage("org.example.test", bob.user_id, bob.device_id, {"a": 1})))
    await bob.sees(nio.UnknownToDeviceEvent, type="org.example.test", sender=alice.user_id)

    mine = f"v3/user/{quote(alice.user_id)}/account_data/org.example.test"
    await alice.ask("PUT", mine, {"colour": "blue"})
    await alice.sees(nio.UnknownAccountDataEvent, type="org.example.test", content={"colour": "blue"})
    assert await alice.ask("GET", mine) == {"colour": "blue"}

    good(await alice.set_pushrule("global", nio.PushRuleKind.room, room, actions=[nio.PushNotify()]))
    assert room in [rule["rule_id"] for rule in (await alice.ask("GET", "v3/pushrules/"))["global"]["room"]]
    good(await alice.delete_pushrule("global", nio.PushRuleKind.room, room))


async def media(alice, bob):
    sent = secrets.token_bytes(300_000)
    uploaded, _ = await alice.upload(io.BytesIO(sent), filesize=len(sent))
    assert good(await bob.download(good(uploaded).content_uri)).body == sent


async def find(alice, bob, room):
    wanted = {"search_categories": {"room_events": {"search_term": "morning", "filter": {"rooms": [room]}}}}
    assert (await alice.ask("POST", "v3/search", wanted))["search_categories"]["room_events"]["count"] == 1

    async with asyncio.timeout(30):
        while not (await alice.ask("POST", "v3/user_directory/search", {"search_term": bob.user}))["results"]:
            await asyncio.sleep(0.2)

    window = {"lists": {"all": {"ranges": [[0, 9]], "timeline_limit": 1, "required_state": []}}}
    assert room in (await alice.ask("POST", "unstable/org.matrix.simplified_msc3575/sync", window))["rooms"]


async def whisper(alice, bob, version):
    room = await meet(alice, bob, version, initial_state=[EnableEncryptionBuilder().as_dict()])
    secret = {"msgtype": "m.text", "body": "nobody else shall know"}
    sent = good(await alice.room_send(room, "m.room.message", secret, ignore_unverified_devices=True))
    heard = await bob.sees(nio.RoomMessageText, event_id=sent.event_id)
    assert heard.decrypted
    assert heard.body == "nobody else shall know"


async def main(url, version, agent):
    alice, bob = [await register_and_log_in(url, agent) for _ in "ab"]
    syncs = [asyncio.create_task(person.sync_forever(timeout=10_000)) for person in (alice, bob)]
    room = await meet(alice, bob, version)
    await talk(alice, bob, room)
    await settings(alice, bob, room)
    await media(alice, bob)
    await find(alice, bob, room)
    await whisper(alice, bob, version)
    for sync, person in zip(syncs, (alice, bob), strict=True):
        sync.cancel()
        token = person.access_token
        good(await person.logout())
        person.access_token = token
        assert (await person.whoami()).status_code == "M_UNKNOWN_TOKEN"
        await person.close()


asyncio.run(main(*sys.argv[1:]))
