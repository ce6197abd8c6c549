"""Reading one tar shard from front to back: a file, a URL by fsspec, or the output of a command."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path, PurePosixPath
from typing import IO, Any

from synco_fast.data.errors import CorruptImageError, DataError, one_line
from synco_fast.data.sources.decode import IMAGE_SUFFIXES, LIMITS, Limits
from synco_fast.data.sources.samples import LABEL_SUFFIXES, choose_images, is_best, sample_key, split_suffix

__all__ = ["DAMAGED", "NEGATIVE", "PIPE", "ShardError", "is_url", "read_images", "read_whole"]

DAMAGED = (tarfile.TarError, ValueError, RecursionError)
"""What tarfile raises for a damaged header: its own errors, those of numbers, and those of headers inside headers."""
NEGATIVE = "a member of negative size"
"""What some versions of tarfile would read again without end."""
PIPE = "pipe:"
"""Begins the name of a shard that a shell command writes to its standard output."""
#: Attempts to read a shard, and the seconds between the first two.
_TRIES, _PAUSE = 4, 1.0
_REASON = 200
#: Images of a run that are held until it ends, at most.
_HELD = 64
#: Bytes read at a time.
_CHUNK = 1 << 18


class ShardError(CorruptImageError):
    """A shard is truncated or no tar file; what was read of it is good."""


def is_url(shard: str) -> bool:
    """Whether a name has a protocol, such as ``s3://``."""
    return "://" in shard


def read_images(
    shard: str, keep: Callable[[int], bool], limits: Limits = LIMITS, *, stop: int | None = None
) -> Generator[tuple[int, str, bytes | CorruptImageError | None], None, None]:
    """The images of a shard in their order, one of each sample.

    A sample is a run of members, by the rules of `choose_images`. What comes behind others of the same sample in
    another run is skipped, too. After a failure of disk, network or command the shard is opened again, and read on
    where it stopped.

    Args:
        shard: A path, a URL, or ``pipe:COMMAND``; compressed or not.
        keep: Whether the bytes of the image of this number are wanted.
        limits: Size limits.
        stop: The number of the first image that is not read any more; None for the whole shard.

    Yields:
        Number in the shard, from 0; name; and bytes, or the reason why there are none, or None where they are not
        wanted.

    Raises:
        ShardError: It is truncated or no tar file.
        DataError: It does not exist, cannot be read, or the command fails.
    """
    done = 0
    for attempt in range(_TRIES):
        try:
            for number, name, content in _read_once(shard, keep, limits, done, stop):
                done = number + 1
                yield number, name, content
            return
        except (DataError, MemoryError):
            raise
        except tarfile.TarError as error:
            raise ShardError(f"{shard}: the shard is truncated or corrupt ({error})") from error
        except Exception as error:  # of the network and its clients: many kinds
            if attempt == _TRIES - 1 or isinstance(error, FileNotFoundError):
                raise DataError(f"data: cannot read the shard {shard} ({one_line(error, _REASON)})") from error
            time.sleep(_PAUSE * 2**attempt)


def _read_once(
    shard: str, keep: Callable[[int], bool], limits: Limits, done: int, stop: int | None
) -> Iterator[tuple[int, str, bytes | CorruptImageError | None]]:
    run = _Run()

    def wanted(number: int) -> bool:
        return number >= done and keep(number)

    with (
        suppress(_Enough),
        _opened(shard) as file,
        tarfile.open(fileobj=file, mode="r|*", bufsize=_CHUNK, tarinfo=_Member) as archive,
    ):
        for name, content in _chosen(archive, run, wanted, shard, limits):
            number, run.number = run.number, run.number + 1
            if number >= done:
                yield number, f"{shard}:{name!r}", content if wanted(number) else None
            if run.number == stop:
                raise _Enough


@dataclass
class _Run:
    """The run of members that is being read.

    Attributes:
        number: Images before those held.
        key: What the names of its members have in common.
        held: Its images that are not chosen from yet, and their bytes, if they may be wanted.
        labels: Names of its members with labels, without their suffixes.
        given: Samples of the shard whose image is given out.
    """

    number: int = 0
    key: str = ""
    held: list[tuple[str, bytes | CorruptImageError | None]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)

    def end(self) -> Iterator[tuple[str, bytes | CorruptImageError | None]]:
        """The chosen images of those held."""
        held, self.held = self.held, []
        for sample in choose_images([name for name, _ in held], self.labels, self.given):
            if sample.name not in self.given:
                self.given.add(sample.name)
                yield held[sample.image]


def _chosen(
    archive: tarfile.TarFile, run: _Run, wanted: Callable[[int], bool], shard: str, limits: Limits
) -> Iterator[tuple[str, bytes | CorruptImageError | None]]:
    """Name and content of one image of each sample; the caller counts them in ``run.number``."""
    try:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                continue
            if sample_key(member.name) != run.key:
                yield from run.end()
                run.key, run.labels = sample_key(member.name), set()
            stem, suffix = split_suffix(member.name)
            if suffix in LABEL_SUFFIXES:
                run.labels.add(stem)
            if suffix not in IMAGE_SUFFIXES or stem in run.given:
                continue
            # Of the images held, each may be a sample of its own.
            needed = any(map(wanted, range(run.number, run.number + len(run.held) + 1)))
            run.held.append((member.name, _content(archive, member, shard, limits) if needed else None))
            if len(run.held) == _HELD or (len(run.held) == 1 and is_best(member.name)):
                yield from run.end()
    except tarfile.TarError:
        yield from run.end()
        raise
    yield from run.end()


def _content(
    archive: tarfile.TarFile, member: tarfile.TarInfo, shard: str, limits: Limits
) -> bytes | CorruptImageError:
    try:
        limits.check_size(member.size, f"{shard}:{member.name!r}")
    except CorruptImageError as error:
        return error
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


class _Enough(Exception):
    """The rest of a shard is not read."""


class _Member(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a truncated or corrupt one as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            found = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except DAMAGED as error:
            raise tarfile.ReadError(one_line(error, _REASON)) from error
        if found.size < 0:
            raise tarfile.ReadError(NEGATIVE)
        return found


@contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    if shard.startswith(PIPE):
        with _output(shard.removeprefix(PIPE)) as file:
            yield file
    elif is_url(shard):
        with _open_url(shard) as file:
            yield file
    else:
        with Path(shard).expanduser().open("rb") as file:
            yield file


def _open_url(url: str) -> Any:
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except (ImportError, ValueError) as error:  # a package for this protocol is missing, or nobody knows it
        raise DataError(f"data: cannot read {url} ({one_line(error, _REASON)})") from error


def read_whole(name: str) -> bytes:
    """The content of a small file, local or behind a URL."""
    with _opened(name) as file:
        return file.read()


@contextmanager
def _output(command: str) -> Iterator[IO[bytes]]:
    """The standard output of a shell command.

    Raises:
        OSError: The command failed; the last line that it wrote to standard error is named.
    """
    with tempfile.TemporaryFile() as said:
        # Its own process group, so that all of a pipeline ends with it; unbuffered, so that no read waits for more than
        # there is.
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=said, bufsize=0, start_new_session=True
        )
        assert process.stdout is not None
        # A worker that ends does not free a reader in the middle of a shard.
        end = util.Finalize(process, _end_group, (process.pid,), exitpriority=0)
        try:
            yield process.stdout
        except tarfile.TarError:
            # A command that failed explains a truncated output better than the output does.
            _check(process, said)
            raise
        else:
            while process.stdout.read(1 << 16):  # the padding behind the end of the archive
                pass
            _check(process, said)
        finally:
            process.stdout.close()
            end()
            process.wait()


def _end_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _check(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    status = process.wait()
    if status:
        said.seek(0)
        last = said.read()[-4096:].decode(errors="replace").strip().splitlines()
        raise OSError(f"the command ended with status {status}{': ' + last[-1] if last else ''}")
