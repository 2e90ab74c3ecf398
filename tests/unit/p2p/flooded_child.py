"""A control channel in a process of its own: answers everything, prints its port, ends with its standard input."""

import os
import sys
import threading
import time

import msgspec

from kvferry.p2p.control import ControlChannel, ControlSettings
from kvferry.p2p.wire import Codec


class Note(msgspec.Struct, tag="note", frozen=True):
    """As in the test."""

    text: str = ""


def main() -> None:
    """Answer until standard input ends."""
    channel = ControlChannel(ControlSettings(max_outbox=64), Codec(Note, 1 << 20))
    print(channel.address.port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        for peer, item in channel.poll():
            if isinstance(item, Note):
                channel.send(peer, Note("y" * 100_000))
        time.sleep(0.001)


main()
