"""The command `arbitor`, and `python -m arbitor`."""

import sys


def run() -> int:
    """`arbitor.cli.main`, and one line if somebody interrupts its imports."""
    try:
        from arbitor.cli import main
    except KeyboardInterrupt:
        print("arbitor: interrupted", file=sys.stderr)
        return 130  # as `cli.INTERRUPTED`, which is not there yet
    return main()


if __name__ == "__main__":
    sys.exit(run())
