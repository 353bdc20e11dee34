"""Patch connections: authenticated channels between the two ends of a move."""

from pipelive_kv.transport.address import Address
from pipelive_kv.transport.channel import Channel, ChannelStats
from pipelive_kv.transport.connector import connect
from pipelive_kv.transport.listener import PatchListener
from pipelive_kv.transport.nccl import DeviceTurn, NcclProbe, nccl_candidates, nccl_probe

__all__ = [
    "Address",
    "Channel",
    "ChannelStats",
    "DeviceTurn",
    "NcclProbe",
    "PatchListener",
    "connect",
    "nccl_candidates",
    "nccl_probe",
]
