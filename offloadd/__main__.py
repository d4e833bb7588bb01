"""The `offloadd` command, also as `python -m offloadd`."""

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command. SIGHUP and SIGUSR2 are ignored before all else: until they are handled, they would end a daemon for good."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.argv[1:] == ["reap"] and os.environ.get("SERVICE_RESULT", "success") != "success":
        # Between a daemon's crash and the next one, which takes over what runs: not a moment is to be lost with imports.
        return
    gc.disable()  # nothing that modules make is garbage, and to look for some takes a tenth of the time until a model is served
    from offloadd.cli import main as run

    gc.enable()
    run()


if __name__ == "__main__":
    main()
