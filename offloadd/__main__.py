"""The `offloadd` command, also as `python -m offloadd`."""

import signal


def main() -> None:
    """Run the command. SIGHUP is ignored before anything else is imported: until it is handled, it would end a daemon for good."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from offloadd.cli import main as run

    run()


if __name__ == "__main__":
    main()
