"""``rgbench`` and ``python -m rgbench``: signals and streams first, since the imports of a command take seconds."""

from rgbench.core.process import end_on_signals, keep_streams


def main() -> None:
    """Entry point of the ``rgbench`` command."""
    end_on_signals()
    keep_streams()
    from rgbench.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
