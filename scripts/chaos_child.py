"""What the workers of `scripts/chaos.py` run for a job: the real thing, with a snapshot behind every block."""

from workers.channel import Channel
from workers.child import attempt
from workers.request import Request


def run(channel: Channel) -> int:
    return attempt(Request.of(channel.receive()), channel, snapshot_seconds=0.0)
