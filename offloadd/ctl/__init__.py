"""The `offloadctl` command: ask a running daemon, and steer it. Each module adds its commands to the app."""

import offloadd.ctl.commands  # noqa: F401  (first, so that help begins with them)
from offloadd.ctl import borrow, chat, explain, follow, pull, top  # noqa: F401
from offloadd.ctl.app import main

__all__ = ("main",)
