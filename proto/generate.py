"""Generate the protobuf code from the IDL, or, with --check, say whether the committed code is stale."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

WITH_SERVICES = {"shardctrler", "shardkv"}


def generate(root: Path, target: Path) -> list[Path]:
    """Write <package>/<name>_pb2*.py below `target`; return the paths, relative to it."""
    protos = sorted((root / "proto").glob("*/*.proto"))
    for proto in protos:
        arguments = ["protoc", f"-I{root / 'proto'}", f"--python_out={target}", f"--pyi_out={target}"]
        if proto.parent.name in WITH_SERVICES:
            arguments.append(f"--grpc_python_out={target}")
        if protoc.main([*arguments, str(proto)]) != 0:
            sys.exit(f"{proto}: protoc failed")
    made = sorted(path for path in target.glob("*/*_pb2*.py*") if path.suffix != ".pyc")
    for path in made:  # protoc imports by the folder; our packages are imported below `shardkv`
        path.write_text(path.read_text().replace("from shardctrler import", "from shardkv.shardctrler import"))
    return [path.relative_to(target) for path in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        generate(options.root, options.root)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for package in (options.root / "proto").iterdir():
            (Path(scratch) / package.name).mkdir()
        stale = [
            path
            for path in generate(options.root, Path(scratch))
            if not (options.root / path).exists()
            or not filecmp.cmp(options.root / path, Path(scratch) / path, shallow=False)
        ]
    if stale:
        sys.exit(f"stale generated code: {', '.join(map(str, stale))}; run `make proto`")


if __name__ == "__main__":
    main()
