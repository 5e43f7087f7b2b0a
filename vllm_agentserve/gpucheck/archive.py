"""All results in one file, since a borrowed machine gives back few files, and is gone when its time is up."""

import tarfile
from pathlib import Path

NAME = "results.tgz"
HELD = ("summary.md", "summary.json", "raw", "logs")


def write_archive(folder: Path) -> None:
    """Writes the archive of a results folder, with what is there so far; in one move, so that it is whole at any time."""
    partial = folder / (NAME + ".part")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        for name in HELD:
            if (folder / name).exists():
                archive.add(folder / name, name)
    partial.replace(folder / NAME)
