"""Write a folder beside its final place and rename it there when it is complete.

At every moment OUT is absent or complete. A process that dies leaves a staging folder, which the next run for
the same OUT removes; a lock keeps two runs apart and vanishes with its process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nsa_convert.errors import MachineError, NsaConvertError, UsageError

_RENAME_EXCHANGE = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Turn failures of the disk and the memory into :class:`MachineError`."""
    try:
        yield
    except NsaConvertError:
        raise
    except MemoryError as error:
        raise MachineError(
            "not enough memory", code="SV07", hint="close other programs or use a bigger machine"
        ) from error
    except OSError as error:
        raise machine_error(error) from error
    except Exception as error:
        # why: safetensors reports a full disk as its own error with the system's text inside
        if type(error).__name__ == "SafetensorError" and "os error" in str(error):
            raise MachineError(
                f"writing failed: {error}", code="SV03", hint="free space or quota and run again"
            ) from error
        # torch.save writes through a zip library that only says where it stands.
        zip_failed = any(word in str(error) for word in ("inline_container", "StreamWriter"))
        if isinstance(error, RuntimeError) and zip_failed:
            raise MachineError(
                f"writing failed: {str(error).splitlines()[0]}",
                code="SV03",
                hint="free space or quota and run again",
            ) from error
        raise


def machine_error(error: OSError) -> MachineError:
    """Return the error a user should see for a failed system call."""
    where = str(error.filename) if error.filename else None
    reason = os.strerror(error.errno) if error.errno else str(error)

    if error.errno in _FULL:
        return MachineError(
            f"writing failed: {reason}", code="SV03", where=where, hint="free space or quota and run again"
        )

    if error.errno in _DENIED:
        hint = "choose a place you may write to, or change its permissions"
        return MachineError(f"{reason}: {where or 'a file'}", code="SV15", where=where, hint=hint)

    return MachineError(f"{reason}: {where or 'a file'}", code="SV03", where=where)


def check_places(source: Path, out: Path) -> None:
    """Refuse an OUT that is, holds, or lies in the source.

    Raises:
        UsageError: The two overlap.
    """
    here = source.resolve()
    there = out.resolve()
    folder = here if here.is_dir() else here.parent

    if there == folder or there in folder.parents or (folder in there.parents and here.is_dir()):
        raise UsageError(
            f"the output {out} and the source {source} overlap",
            code="SV04",
            where=str(out),
            expected="a folder outside the source",
            hint="choose another OUT",
        )


def check_free(out: Path, *, overwrite: bool, recognise: str) -> None:
    """Refuse an OUT that holds something already.

    Args:
        out: The final place.
        overwrite: Allow replacing a folder.
        recognise: A file that a folder must hold to be replaced, so that no unrelated folder is ever removed.

    Raises:
        UsageError: OUT is a file, or a folder with something in it.
    """
    # What may lie there: nothing, or an empty folder.
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(
            f"{out} exists and is not a folder", code="SV05", where=str(out), hint="choose another OUT"
        )
    if not out.is_dir() or not any(out.iterdir()):
        return

    # A folder with something in it is replaced on demand, and only if it is a checkpoint.
    if not overwrite:
        raise UsageError(
            f"{out} exists and is not empty",
            code="SV05",
            where=str(out),
            expected="a new or an empty folder",
            hint="choose another OUT, or --overwrite replaces it",
        )
    if not (out / recognise).is_file():
        raise UsageError(
            f"{out} holds something else than a checkpoint; it is not replaced",
            code="SV05",
            where=str(out),
            hint="remove it yourself if you mean it",
        )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; rename it to ``out`` when the block ends well, else remove it.

    Raises:
        UsageError: Another process is writing the same OUT.
        MachineError: The parent folder cannot be written.
    """
    parent = out.absolute().parent
    tag = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
    staging = parent / f".nsa-staging-{tag}"
    old = parent / f".nsa-replaced-{tag}"

    with machine_errors():
        parent.mkdir(parents=True, exist_ok=True)  # why: the folder in which staging folder, lock and OUT lie

        # One process at a time; what a dead one left is cleared first.
        with _lock(parent / f".nsa-lock-{tag}", out):
            _recover(out, staging, old)
            staging.mkdir()  # why: everything is written here and renamed when it is whole
            try:
                yield staging
                _publish(staging, out, old)
            finally:
                # why: published by now, or left half-written by an error
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Make the folder ``out`` and lock it against other processes while the block runs.

    The processes of one distributed run share the lock of their first one.

    Raises:
        UsageError: Another process works there.
        MachineError: The folder cannot be written.
    """
    with machine_errors():
        out.mkdir(parents=True, exist_ok=True)  # why: the lock of a run lies inside its folder

    if int(os.environ.get("RANK", "0")):
        yield
        return

    with contextlib.ExitStack() as stack:
        with machine_errors():
            stack.enter_context(_lock(out / ".nsa-lock", out))
        yield


def free_bytes(folder: Path) -> int:
    """Return the free space of the file system that will hold ``folder``."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(out: Path, needed: int) -> None:
    """Raise MachineError unless the file system of OUT has room for ``needed`` bytes."""
    free = free_bytes(out.absolute().parent)
    if needed > free:
        raise MachineError(
            f"{out} needs {gigabytes(needed)}, {gigabytes(free)} are free",
            code="SV02",
            where=str(out),
            expected=gigabytes(needed),
            found=gigabytes(free),
            hint="free some space or choose another disk",
        )


def gigabytes(count: int) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def link_file(source: Path, target: Path) -> bool:
    """Make a hard link; return False where that is impossible, as between two file systems."""
    try:
        os.link(source, target)  # why: a shard of the source, inside the staging folder of the caller
    except OSError:  # why: where no hard link is possible the caller copies
        return False
    return True


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file; the copy gets the mode the umask asks for."""
    # why: a file of the source, inside the staging folder of the caller
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 4 << 20)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically and make its folder: afterwards the file is complete or as it was.

    Raises:
        MachineError: Disk or permission.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    with machine_errors():
        # why: the folder of a file that the caller was asked for
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # why: written aside and renamed, so that the file is whole or absent
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)  # why: renamed by now, or left half-written by an error


def use_umask(path: Path) -> None:
    """Give a file the mode the umask asks for; safetensors creates its files for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # why: the safetensors writer makes files that only their owner may read


def _publish(staging: Path, out: Path, old: Path) -> None:
    """Flush the small files and the folder, then rename; a replaced folder is removed last, by the caller."""
    # Hard links are left out: their bytes lie in the source, which is on disk already.
    own = [path for path in staging.rglob("*") if path.is_dir() or path.stat().st_nlink == 1]
    # Together, because the file system writes waiting requests in one go.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_sync, own))
    _sync(staging)

    taken = out.is_dir() and any(out.iterdir())
    if not (taken and _exchange(staging, out)):
        if taken:
            out.rename(old)  # why: without an exchange in one step OUT is absent for a moment, never half
        staging.rename(out)  # why: the whole folder takes its final name

    _sync(out.absolute().parent)
    # why: what --overwrite asked to replace, after its successor is in place
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where that cannot be."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD: the paths are relative to the working directory
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(two), _RENAME_EXCHANGE) == 0


def _recover(out: Path, staging: Path, old: Path) -> None:
    """Clean up after a killed process; killed between its two renames, it gets the old folder put back."""
    if old.exists():
        if out.exists():
            shutil.rmtree(old)  # why: its successor was published before the process was killed
        else:
            old.rename(out)  # why: killed before its successor was published: the old folder comes back
    if staging.exists():
        shutil.rmtree(staging)  # why: what a killed process left half-written


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock(path: Path, out: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the block removes the file, the end of the process the lock."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            raise UsageError(
                f"another process is writing {out}" + (f": {owner}" if owner else ""),
                code="SV16",
                where=str(out),
                hint="wait for it to end",
            ) from error
        # why: the last owner removed the lock file between our open and our lock: another turn
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)

    try:
        os.ftruncate(handle, 0)  # the lock of a dead process is free, its name stands there still
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # why: the lock file is ours, and nobody needs it any more
        os.close(handle)
