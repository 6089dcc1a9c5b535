"""The archive: journal and checkpoints of one store at a target.

    PREFIX/journal/<store_id>/<epoch>-<first_seq>-<last_seq>.log  frames as they are on disk
    PREFIX/checkpoints/<store_id>/<epoch>-<seq>.log.zst           the whole state

An object is put once and never over another. What has the wanted name is read and compared:
the same bytes are as good as put, others are left alone, and this store goes on under another
name. Which of several stretches belong together is told by their chain values, not by names.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, final

import msgspec
import zstandard

from cas.errors import Conflict
from replicator.bandwidth import Bandwidth, Sending
from replicator.probe import Profile
from replicator.reading import read_pieces
from replicator.targets import Body, Changed, ObjectAbsent, ObjectStat, Target, TargetError

_READ_BYTES: Final = 1 << 20
_SINGLE_BYTES_MAX: Final = 64 << 20  # larger checkpoints go in parts
_STRETCH: Final = re.compile(r"([0-9]+)-([0-9]+)-([0-9]+)\.log", re.ASCII)
_STATE: Final = re.compile(r"([0-9]+)-([0-9]+)\.log\.zst", re.ASCII)
_JOURNAL: Final = "journal/"
_CHECKPOINTS: Final = "checkpoints/"

_log = logging.getLogger("blobcask.replicator")


class Taken(Conflict):
    """An object with the wanted name is there, and holds other bytes."""


@final
class Stretch(msgspec.Struct, frozen=True, order=True):
    """The name of an object of the journal: which frames it holds."""

    epoch: int
    first_seq: int
    last_seq: int

    @property
    def filename(self) -> str:
        return f"{self.epoch}-{self.first_seq:020}-{self.last_seq:020}.log"


@final
class State(msgspec.Struct, frozen=True, order=True):
    """The name of a shipped checkpoint."""

    epoch: int
    seq: int

    @property
    def filename(self) -> str:
        return f"{self.epoch}-{self.seq:020}.log.zst"


@final
class Archive:
    """One store's history at a target. Calls block, as the target's do; raises TargetError."""

    def __init__(
        self,
        target: Target,
        store_id: str,
        profile: Profile | None = None,
        stop: threading.Event | None = None,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        """`profile` is needed for what puts, which `bandwidth` may slow down. `stop`, once
        set, ends every call in the middle with SendingStopped."""
        self._target = target
        self._bandwidth = bandwidth or Bandwidth(0)
        self._stop = stop or threading.Event()
        self._profile = profile
        self.store_id = store_id
        self._journal = f"{_JOURNAL}{store_id}/"
        self._checkpoints = f"{_CHECKPOINTS}{store_id}/"

    def distrust(self) -> None:
        """Ask for no condition any more: the target was seen not to honour them."""
        assert self._profile is not None
        self._profile = msgspec.structs.replace(self._profile, conditional=False)

    @property
    def profile(self) -> Profile | None:
        """What the target honours, as far as is known now."""
        return self._profile

    # --- reading

    def stretches(self) -> dict[Stretch, ObjectStat]:
        """The objects of the journal, in order."""
        found = {}
        for stat in self._target.list(self._journal):
            if match := _STRETCH.fullmatch(stat.key.removeprefix(self._journal)):
                found[Stretch(int(match[1]), int(match[2]), int(match[3]))] = stat
        return dict(sorted(found.items()))

    def states(self) -> dict[State, ObjectStat]:
        """The checkpoints, oldest first."""
        found = {}
        for stat in self._target.list(self._checkpoints):
            if match := _STATE.fullmatch(stat.key.removeprefix(self._checkpoints)):
                found[State(int(match[1]), int(match[2]))] = stat
        return dict(sorted(found.items()))

    def fetch_stretch(self, stretch: Stretch, path: Path) -> None:
        """Write the object to `path`; raises ObjectAbsent."""
        with path.open("wb") as file:
            for piece in self._pieces_of(self._journal + stretch.filename):
                file.write(piece)

    def fetch_state(self, state: State, path: Path, limit_bytes: int = 0) -> None:
        """Write the checkpoint, unpacked, to `path`, or its first `limit_bytes`.

        Raises ObjectAbsent, and zstandard.ZstdError where it is damaged.
        """
        unpack = zstandard.ZstdDecompressor().decompressobj()
        size_bytes = 0
        with path.open("wb") as file:
            for piece in self._pieces_of(self._checkpoints + state.filename):
                size_bytes += file.write(unpack.decompress(piece))
                if limit_bytes and size_bytes >= limit_bytes:
                    return

    # --- writing

    def put_stretch(self, stretch: Stretch, data: bytes) -> None:
        """Put frames; verified on return. Raises Taken."""
        self._put_once(self._journal + stretch.filename, io.BytesIO(data), len(data))

    def put_state(self, state: State, path: Path) -> int:
        """Pack the checkpoint at `path` and put it; verified on return. Returns its bytes.

        Raises Taken where another state has the name.
        """
        with path.open("rb") as plain, tempfile.TemporaryFile(dir=path.parent.parent) as packed:
            zstandard.ZstdCompressor(level=3).copy_stream(plain, packed)
            size_bytes = packed.tell()
            packed.seek(0)
            key = self._checkpoints + state.filename
            try:
                self._put_once(key, packed, size_bytes)
            except Taken:
                # The same state may have been packed otherwise.
                if not self._holds_state(key, path):
                    raise
        return size_bytes

    def delete_stretch(self, stretch: Stretch) -> None:
        self._target.delete(self._journal + stretch.filename)

    def delete_state(self, state: State) -> None:
        self._target.delete(self._checkpoints + state.filename)

    # --- inside

    def _pieces_of(self, key: str) -> Iterator[bytes]:
        return read_pieces(self._target, key, self._stop)

    def _sending(self, body: Body) -> Body:
        return Sending(body, self._bandwidth, self._stop)

    def _put_once(self, key: str, body: BinaryIO, size_bytes: int) -> None:
        assert self._profile is not None
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        for piece in _pieces(body.read):
            sha256.update(piece)
            md5.update(piece)
        body.seek(0)
        if not self._is_there(key):
            if size_bytes <= _SINGLE_BYTES_MAX or not self._profile.multipart:
                self._put_whole(key, self._sending(body), size_bytes, md5.digest())
            else:
                self._put_parts(key, body, size_bytes)
        back = hashlib.sha256()
        for piece in self._pieces_of(key):
            back.update(piece)
        if back.digest() != sha256.digest():
            raise Taken(f"{key} at {self._target.place} holds other bytes than this node's")

    def _put_whole(self, key: str, body: Body, size_bytes: int, md5: bytes) -> None:
        assert self._profile is not None
        try:
            self._target.put(key, body, size_bytes, md5=md5, if_absent=self._profile.conditional)
        except Changed:  # by another node, or by this request, sent twice
            if self._is_there(key):
                return
            _log.warning(
                "%s refused %s as if it were there: it does not honour conditions, and is not "
                "asked for them from now on",
                self._target.place,
                key,
            )
            self.distrust()
            body.seek(0)
            self._target.put(key, body, size_bytes, md5=md5)

    def _is_there(self, key: str) -> bool:
        try:
            self._target.stat(key)
        except ObjectAbsent:
            return False
        return True

    def _put_parts(self, key: str, body: Body, size_bytes: int) -> None:
        assert self._profile is not None
        part_bytes = self._profile.part_bytes_of(size_bytes)
        upload_id = self._target.begin(key)
        try:
            etags = []
            for number, piece in enumerate(_pieces(lambda _: body.read(part_bytes)), start=1):
                md5 = hashlib.md5(piece, usedforsecurity=False).digest()
                etags.append(
                    self._target.put_part(
                        key,
                        upload_id,
                        number,
                        self._sending(io.BytesIO(piece)),
                        len(piece),
                        md5,
                    )
                )
            self._target.complete(key, upload_id, etags)
        except BaseException:
            with suppress(TargetError):
                self._target.abort(key, upload_id)
            raise

    def _holds_state(self, key: str, path: Path) -> bool:
        unpack = zstandard.ZstdDecompressor().decompressobj()
        there, here = hashlib.sha256(), hashlib.sha256()
        try:
            for piece in self._pieces_of(key):
                there.update(unpack.decompress(piece))
        except zstandard.ZstdError:
            return False
        with path.open("rb") as file:
            for piece in _pieces(file.read):
                here.update(piece)
        return there.digest() == here.digest()


def stores_at(target: Target) -> set[str]:
    """The identifiers of the stores that have shipped anything to `target`."""
    listed = (target.list(prefix) for prefix in (_JOURNAL, _CHECKPOINTS))
    return {stat.key.split("/")[1] for stats in listed for stat in stats}


def _pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while piece := read(_READ_BYTES):
        yield piece
