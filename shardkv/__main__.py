"""`shardkv` and `python -m shardkv`: the command line, or which extra brings the part that is missing.

The bare package is the client, and has neither the command line nor the server.
"""

from __future__ import annotations

import signal
import sys

CLI = {"click", "rich"}
SERVER = {"google_crc32c", "grpc", "grpc_health", "grpc_reflection", "prometheus_client", "rocksdict", "uvloop"}


def main() -> None:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends us without a word
    try:
        from shardkv.cli.main import main as run

        signal.signal(signal.SIGINT, before)
        run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in CLI | SERVER:
            raise
        extra = "cli" if missing in CLI else "server"
        sys.exit(f"shardkv: this needs the package {missing}: pip install 'shardkv[{extra}]'")


if __name__ == "__main__":
    main()
