"""Clients that don't stop asking."""

import secrets
import threading
import time

from deployment import Refused, quote

CLIENT = "/_matrix/client/v3"
SLIDING_SYNC = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"


class Load:
    """Clients at work, each a thread that asks again and again: ``sent`` and ``failed`` say what became of it."""

    def __init__(self, deployment):
        self.deployment, self.over = deployment, threading.Event()
        self.sent, self.failed = 0, []
        alice, bob = deployment.user(), deployment.user()
        room = alice.room(invite=[bob.id])
        bob.join(room)
        event = alice.say(room, "hello")
        path = f"{CLIENT}/rooms/{quote(room)}"
        self.works = {
            "sync": lambda: bob.sync(timeout=3000),
            "sliding sync": lambda: alice.ask("POST", f"{SLIDING_SYNC}?timeout=3000", {"lists": {}}),
            "message": lambda: alice.say(room, "and again"),
            "state": lambda: alice.ask("PUT", f"{path}/state/m.room.topic", {"topic": secrets.token_hex(4)}),
            "typing": lambda: bob.ask("PUT", f"{path}/typing/{quote(bob.id)}", {"typing": True, "timeout": 1000}),
            "receipt": lambda: bob.ask("POST", f"{path}/receipt/m.read/{quote(event)}", {}),
            "messages": lambda: alice.ask("GET", f"{path}/messages?dir=b"),
            "pushers, by main": lambda: alice.ask("GET", f"{CLIENT}/pushers"),
            "media": lambda: alice.ask("POST", "/_matrix/media/v3/upload", b"text", **{"Content-Type": "text/plain"}),
        }

    def ask(self, what, work):
        while not self.over.is_set():
            began = time.monotonic()
            try:
                self.sent += 1
                work()
            except (Refused, OSError) as err:
                self.failed.append(f"{what}, {time.monotonic() - began:.1f} s: {err}")
            time.sleep(0.02)

    def __enter__(self):
        self.threads = [threading.Thread(target=self.ask, args=work) for work in self.works.items()]
        for thread in self.threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_):
        time.sleep(1)
        self.over.set()
        for thread in self.threads:
            thread.join()
