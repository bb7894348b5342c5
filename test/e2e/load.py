"""Clients that don't stop asking."""

import collections
import secrets
import threading
import time

from deployment import Refused, quote, until

CLIENT = "/_matrix/client/v3"
SLIDING_SYNC = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"


class Load:
    """Clients at work, each a thread that asks again and again: ``sent`` and ``failed`` say what became of it."""

    def __init__(self, deployment):
        self.over = threading.Event()
        self.sent, self.answered, self.failed = 0, collections.Counter(), []
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
                self.answered[what] += 1
            except (Refused, OSError) as err:
                self.failed.append(f"{what}, {time.monotonic() - began:.1f} s: {err}")
            self.over.wait(0.02)

    def __enter__(self):
        self.threads = [threading.Thread(target=self.ask, args=work) for work in self.works.items()]
        for thread in self.threads:
            thread.start()
        self.wait_for_all_kinds()
        return self

    def wait_for_all_kinds(self):
        """One more good answer to each kind of request."""
        before = self.answered.copy()
        until(lambda: all(self.answered[what] > before[what] for what in self.works), "all are answered")

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait_for_all_kinds()
        finally:
            self.over.set()
        for thread in self.threads:
            thread.join()
