"""Files with sectors that the disk cannot read: real ones, on a loop device whose backing file is cut short."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

BLOCK = 4096

can_be_made = os.geteuid() == 0 and Path("/dev/loop-control").exists() and bool(shutil.which("mkfs.ext4"))


class BadSectors:
    """Moves files to disks of their own, which then lose a part. `close` unmounts them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounted: list[Path] = []
        self._images: dict[Path, tuple[Path, int, int]] = {}  # where the file begins, and how long it is

    def move(self, path: Path) -> None:
        """The file is on a disk of its own from now on, and a link in its place."""
        data = path.read_bytes()
        mount = self._directory / f"bad-{len(self._images)}"
        image = mount.with_suffix(".image")
        mount.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(2 * len(data) + (4 << 20))
        # Without a journal: the file is then the last thing on the device.
        quiet = ("mkfs.ext4", "-q", "-b", str(BLOCK), "-O", "^has_journal", "-m", "0")
        subprocess.run([*quiet, str(image)], check=True)
        self._mount(image, mount)
        (mount / path.name).write_bytes(data)
        self._unmount(mount)
        contents = image.read_bytes()
        begin = contents.find(data[:BLOCK])
        assert begin > 0 and contents[begin : begin + len(data)] == data, "the file is not in one piece"
        self._mount(image, mount)  # with nothing of the file in the page cache
        path.unlink()
        path.symlink_to(mount / path.name)
        self._images[path] = image, begin, len(data)

    def spoil(self, path: Path, part: float = 0.5) -> int:
        """From this part of the file on, no sector of it can be read any more; returns the offset."""
        image, begin, size = self._images[path]
        offset = int(size * part) // BLOCK * BLOCK
        os.truncate(image, begin + offset)
        return offset

    def lose(self, path: Path, part: float = 0.5) -> int:
        """Both at once."""
        self.move(path)
        return self.spoil(path, part)

    def _mount(self, image: Path, mount: Path) -> None:
        subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
        self._mounted.append(mount)

    def _unmount(self, mount: Path) -> None:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        self._mounted.remove(mount)

    def close(self) -> None:
        for mount in list(self._mounted):
            self._unmount(mount)
