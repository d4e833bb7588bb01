"""What /proc tells of processes."""

from __future__ import annotations

import subprocess
import sys

from offloadd.observe.processes import open_ports


def test_what_a_tree_lets_a_network_reach() -> None:
    """Sockets of a child count, loopback's and those that do not listen do not."""
    script = (
        "import socket, sys, os\n"
        "open_, closed = socket.create_server(('0.0.0.0', 0)), socket.create_server(('127.0.0.1', 0))\n"
        "print(open_.getsockname()[1], flush=True)\n"
        "os.read(0, 1)\n"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", parent, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        assert open_ports(process.pid) == (f"0.0.0.0:{port}",)
    finally:
        process.communicate("x", timeout=30)
    assert open_ports(process.pid) == ()
