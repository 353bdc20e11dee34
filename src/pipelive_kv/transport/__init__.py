"""Patch connections: authenticated channels between the two ends of a move."""

from pipelive_kv.transport.address import Address
from pipelive_kv.transport.channel import Channel, ChannelStats
from pipelive_kv.transport.listener import PatchListener, connect

__all__ = ["Address", "Channel", "ChannelStats", "PatchListener", "connect"]
