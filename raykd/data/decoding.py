"""Encoded images to uint8 of one size, and the cache that keeps them: an epoch then reads rows of a memory map."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raykd.errors import DataError

Images: TypeAlias = NDArray[np.uint8]
Payload: TypeAlias = "bytes | Images"
Size: TypeAlias = "int | tuple[int, int] | None"

_LOCK_SECONDS = 3600.0
_STALE_SECONDS = 86400.0


def decode(payload: Payload, size: Size = None, channels: int | None = None) -> Images:
    """One image as uint8 [c h w].

    Args:
        payload: an encoded file (PNG, JPEG, whatever PIL reads) or uint8 [c h w].
        size: None keeps the image's own; (h, w) resizes, bilinear with antialias; one int scales the shorter side to it
            and cuts the centre square.
        channels: 1 or 3; None keeps an array's own and turns encoded images to RGB.

    Raises:
        DataError: it is no image, or holds more than 8 bits a channel.
    """
    if isinstance(payload, bytes):
        image = _open(payload, "L" if channels == 1 else "RGB")
    elif payload.shape[0] not in (1, 3):
        raise DataError(f"image: expected 1 or 3 channels, got {payload.shape[0]}. Store [3 h w] or [1 h w].")
    elif size is None and channels in (None, len(payload)):
        return payload
    else:
        image = Image.fromarray(payload[0] if len(payload) == 1 else np.ascontiguousarray(payload.transpose(1, 2, 0)))
        if channels is not None:
            image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(_fit(image, size))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(payload: bytes, mode: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(payload))
        if image.mode.startswith(("I", "F")):
            raise DataError(f"image: expected 8 bits a channel, got mode {image.mode}. Convert the file to 8 bits.")
        return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        cause = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise DataError(f"image: expected PNG, JPEG or the like, got {len(payload)} bytes that do not decode{cause}") from error


def _fit(image: Image.Image, size: Size) -> Image.Image:
    """`image` in `size`, as `decode` says."""
    if size is None:
        return image
    if isinstance(size, int):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_all(chunks: Iterable[tuple[int, list[Payload]]], out: Images, decode_one: Callable[[Payload, int], Images]) -> None:
    """Decodes chunks in threads (PIL releases the interpreter) into `out` [n c h w], a bounded number in flight.

    Args:
        chunks: (first row, payloads) of consecutive rows.
        out: filled in place.
        decode_one: (payload, row) to uint8 [c h w]; its error names the row.
    """

    def fill(start: int, payloads: list[Payload]) -> None:
        for row, payload in enumerate(payloads, start):
            out[row] = decode_one(payload, row)

    threads = min(cpu_count(), 16)
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="raykd-decode") as pool:
        try:
            for start, payloads in chunks:
                pending.append(pool.submit(fill, start, payloads))
                if len(pending) > 2 * threads:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class DecodeOne:
    """Decodes rows of one data set and insists on one shape; an error names shard, row group and row."""

    def __init__(
        self, where: Callable[[int], str], size: Size, channels: int | None, shape: tuple[int, int, int] | None = None
    ) -> None:
        self.where, self.size, self.channels, self.shape = where, size, channels, shape

    def __call__(self, payload: Payload, row: int) -> Images:
        """uint8 [c h w] of `row`. Raises DataError when it does not decode or has another shape than the first."""
        try:
            image = decode(payload, self.size, self.channels)
        except DataError as error:
            raise DataError(f"{error} ({self.where(row)})") from error
        if self.shape is not None and image.shape != self.shape:
            raise DataError(
                f"image size: expected {self.shape} like the first image, got {image.shape} ({self.where(row)}). "
                "Set size=(h, w), or size=s for a centre square, so that all images have one size."
            )
        return image


def cache_folder() -> Path:
    """Where decoded images are kept: $RAYKD_CACHE, else ~/.cache/raykd."""
    return Path(os.environ.get("RAYKD_CACHE") or Path.home() / ".cache" / "raykd")


def cached(key: str, shape: tuple[int, ...]) -> Images | None:
    """The cached array of `key`, a read-only memory map, or None when it is absent or of another shape."""
    path = cache_folder() / f"{key}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def build_cache(key: str, shape: tuple[int, ...], fill: Callable[[Images], None]) -> Images:
    """Fills the cache of `key` and returns it as a memory map; safe when many processes do so at once.

    One process fills while the others wait (an advisory lock that ends with its holder; without lock support each fills a
    file of its own); the file appears by an atomic rename, so that nobody sees a part of it.

    Raises:
        DataError: no space, or no permission to write.
    """
    folder = cache_folder()
    temporary = folder / f"{key}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            found = cached(key, shape)
            if found is not None:
                return found
            _remove_stale(folder)
            _need_space(folder, int(np.prod(shape)))
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            fill(array)
            array.flush()
            del array
            os.replace(temporary, folder / f"{key}.npy")
    except OSError as error:
        raise DataError(f"decoded cache: cannot write {folder}: {error}. Set RAYKD_CACHE, or cache='memory'.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    found = cached(key, shape)
    if found is None:
        raise DataError(f"decoded cache: {folder / key}.npy vanished after it was written. Set RAYKD_CACHE to another folder.")
    return found


def _need_space(folder: Path, needed: int) -> None:
    limit = int(os.environ.get("RAYKD_CACHE_BYTES") or 0)
    free = shutil.disk_usage(folder).free
    room = min(free, limit) if limit else free
    if needed > room:
        raise DataError(
            f"decoded cache: expected {needed / 2**30:.2f} GiB of room, got {room / 2**30:.2f} GiB ({folder}). "
            "Set a smaller size, RAYKD_CACHE to another disk, RAYKD_CACHE_BYTES higher, or cache='none'."
        )


def _remove_stale(folder: Path) -> None:
    """Removes parts that killed processes left behind more than a day ago."""
    for part in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock on `path`; gives up after an hour, or at once where the file system has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    end = time.monotonic() + _LOCK_SECONDS
    with open(path, "w") as file:
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
