"""The `offloadd` command, also as `python -m offloadd`."""

import signal


def main() -> None:
    """Run the command. SIGHUP and SIGUSR2 are ignored before all else: until they are handled, they would end a daemon for good."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    from offloadd.cli import main as run

    run()


if __name__ == "__main__":
    main()
