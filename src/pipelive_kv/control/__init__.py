"""The control plane: authenticated request and reply between the coordinator and its participants."""

from pipelive_kv.control.client import ControlClient
from pipelive_kv.control.endpoint import ControlEndpoint, ControlKey
from pipelive_kv.control.server import ControlServer

__all__ = ["ControlClient", "ControlEndpoint", "ControlKey", "ControlServer"]
