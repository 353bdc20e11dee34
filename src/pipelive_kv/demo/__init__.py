"""The demo: real stage processes change their layers while requests decode; nothing is staged.

``options`` (what is asked for), ``setup`` (model, prompts, budget), ``recorder`` (what was seen),
``scenario`` (what happens when), ``baselines`` (stop-and-copy, restart), ``measure`` and ``report``
(what it means), ``live``, ``timeline``, ``summary`` (how it is shown) and ``run`` (all together).
"""

from pipelive_kv.demo.options import DemoOptions, OptionError
from pipelive_kv.demo.report import DemoReport

__all__ = ["DemoOptions", "DemoReport", "OptionError"]
