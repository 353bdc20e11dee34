"""The control plane: authenticated requests from the coordinator to its participants."""

from pipelive_kv.control.client import ControlClient
from pipelive_kv.control.endpoint import ControlEndpoint, ControlKey
from pipelive_kv.control.server import ControlServer

__all__ = ["ControlClient", "ControlEndpoint", "ControlKey", "ControlServer"]
