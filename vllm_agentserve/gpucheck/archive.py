"""All results in one file, since a borrowed machine gives back few files, and is gone when its time is up."""

import tarfile
from pathlib import Path

NAME = "results.tgz"
HELD = ("summary.md", "summary.json", "raw", "logs")


def write_archive(folder: Path) -> None:
    """Writes the archive of a results folder, with what is there so far; in one move, so that it is whole at any time.

    Raises:
        OSError: there is no room for it; the one before stays.
    """
    partial = folder / (NAME + ".part")
    try:
        with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
            for name in HELD:
                if (folder / name).exists():
                    archive.add(folder / name, name)
        partial.replace(folder / NAME)
    finally:
        # Half of one would only take the room that is missing.
        partial.unlink(missing_ok=True)
