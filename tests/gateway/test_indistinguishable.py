"""What belongs to somebody else and what is nowhere get one answer, in the same time.

Invariant 9. Each case asks a real server for both kinds, one of each in random order, over
one connection. The answers must be equal byte for byte, and so must the time that they
take: warm, where the same few things are asked for again and again, and cold, where each
thing is asked for once by a server that was just started over an empty page cache.

How time is judged. In each pair chance decides which is asked first, so without a leak the
sign of the difference is a fair coin, whatever else the machine does: Wilcoxon's signed
ranks then give a `z` that is over 5 once in two million comparisons. A difference that is
certain but smaller than ALLOWED_US is let pass: a single answer varies by several times as
much, and nobody can ask so often without meeting the limits, which are off here. Where a
machine is so busy that the pairs leave a doubt, more are asked.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import socket
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from cas.catalog import Transaction
from cas.clock import HOUR_US, SystemClock
from cas.config import Settings, StoreSettings
from cas.files import PutItem
from cas.keys import load_keys
from cas.records import COMPLETED, RESULT, Step, StepValue
from cas.store import Store
from cas.uploads import UploadRequest
from gateway.auth import ADMIN, Tokens
from tests.gateway.served import Served, serving
from workflows.approvals import ApprovalRequest
from workflows.definitions import Definition, Task
from workflows.runs import Runs
from workflows.signatures import FORM
from workflows.views import Workflows
from workflows.webhooks import WebhookRequest

# Under 5 % of what the fastest answer takes.
ALLOWED_US: Final = 15.0
CERTAIN_Z: Final = 5.0
DOUBT_Z: Final = 2.0
# Pairs of each case. The usual run asks more than 10,000 times, all cases together; the
# soak does so for each case, warm and cold.
ROUNDS_MAX: Final = 8
WARM_PAIRS: Final = 100
COLD_PAIRS: Final = 100
SOAK_PAIRS: Final = 5_000
WARM_THINGS: Final = 8
# What is warm may be asked for again: the fastest answer is the one that nothing disturbed.
WARM_REPEATS: Final = 3
# Pages that another processor is busy with stay when the kernel is told to drop them.
FORGETTING: Final = 100
ONCE: Final = 1  # what was asked for is not cold any more
DEDUPE_PAIRS: Final = 60
DEDUPE_PAIRS_SOAK: Final = 2_000
DEDUPE_BYTES: Final = 4096
DEDUPE_SHARE: Final = 0.05
BYTES: Final = 64
MANY_BYTES: Final = 200 << 10  # of a call: less than [events] payload_max
# Of a run's definition: what is read of it would be seen.
DEFINITION_BYTES: Final = 16 << 10
AT_ONCE: Final = 500  # records, in one transaction

US, THEM, OTHERS = "acme", "rival", "third"


# --- statistics


class Verdict(NamedTuple):
    """How much longer the foreign took: by the median of the differences, and how sure."""

    shift_us: float
    z: float
    median_us: float

    @property
    def tells(self) -> bool:
        return abs(self.shift_us) > ALLOWED_US and abs(self.z) > CERTAIN_Z

    @property
    def clear(self) -> bool:
        """Whether more pairs would hardly say anything else."""
        return self.tells or abs(self.shift_us) < ALLOWED_US or abs(self.z) < DOUBT_Z


def judge(pairs: list[tuple[float, float]]) -> Verdict:
    """Compare (foreign, unknown) times in µs by Wilcoxon's signed ranks."""
    differences = [foreign - unknown for foreign, unknown in pairs]
    ranked = sorted(filter(None, differences), key=abs)
    count = len(ranked)
    score = sum(math.copysign(rank, value) for rank, value in enumerate(ranked, 1))
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 6) or 1.0
    median_us = statistics.median(unknown for _, unknown in pairs)
    return Verdict(statistics.median(differences), score / spread, median_us)


def judge_until_clear(
    pair: Callable[[int], tuple[float, float]],
    pairs: int,
    *,
    rounds: int = ROUNDS_MAX,
    clear: Callable[[Verdict], bool] = lambda verdict: verdict.clear,
) -> Verdict:
    """Ask for so many pairs, by their number, and again while it is not clear what they say."""
    taken: list[tuple[float, float]] = []
    while True:
        taken += [pair(len(taken) + number) for number in range(pairs)]
        verdict = judge(taken)
        if clear(verdict) or len(taken) >= rounds * pairs:
            return verdict


@pytest.mark.parametrize("planted_us", [-50.0, 50.0])
def test_fifty_microseconds_on_one_side_are_found(planted_us: float) -> None:
    """Among answers of 400 µs whose length varies by 100 and is sometimes far off."""
    chance = random.Random(1)

    def answer_us() -> float:
        return chance.gauss(400, 100) + (chance.random() < 0.05) * chance.expovariate(1 / 5_000)

    found = judge_until_clear(lambda _: (answer_us() + planted_us, answer_us()), WARM_PAIRS)
    assert found.tells
    assert abs(found.shift_us - planted_us) < 20


def test_chance_alone_is_not_taken_for_a_difference() -> None:
    chance = random.Random(1)
    for _ in range(1_000):
        pairs = [(chance.expovariate(1), chance.expovariate(1)) for _ in range(WARM_PAIRS)]
        assert abs(judge(pairs).z) < CERTAIN_Z


# --- asking


class Connection:
    """One kept connection, with nothing between two answers but what they took."""

    def __init__(self, served: Served) -> None:
        self._socket = served.connect()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def ask(self, request: bytes) -> tuple[float, bytes]:
        """The time in µs from sending to the whole answer, and the answer but its date."""
        began = time.perf_counter()
        self._socket.sendall(request)
        head, _, body = self._until_head().partition(b"\r\n\r\n")
        if not request.startswith(b"HEAD"):
            length = re.search(rb"\r\nContent-Length: (\d+)", head, re.IGNORECASE)
            while length and len(body) < int(length[1]):
                body += self._more()
        taken_us = (time.perf_counter() - began) * 1e6
        return taken_us, re.sub(rb"\r\nDate: [^\r]+", b"", head) + b"\r\n\r\n" + body

    def _until_head(self) -> bytes:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more()
        return received

    def _more(self) -> bytes:
        data = self._socket.recv(65536)
        assert data, "the connection was closed"
        return data


@contextmanager
def connected(served: Served) -> Iterator[Connection]:
    """A connection that is measured on; no garbage is collected meanwhile."""
    connection = Connection(served)
    gc.collect()
    gc.disable()
    try:
        yield connection
    finally:
        gc.enable()
        connection.close()


Ask = Callable[[str], bytes]


def asks(method: str, path: str, *lines: str, body: bytes = b"") -> Ask:
    """Makes a request of the thing that stands for {} in its path."""
    sent = [*lines, "X-Request-Id: same"]
    if body or method in ("PUT", "POST", "PATCH"):
        sent.append(f"Content-Length: {len(body)}")

    def request(thing: str) -> bytes:
        head = [f"{method} {path.replace('{}', thing)} HTTP/1.1", "Host: a", *sent, "", ""]
        return "\r\n".join(head).encode() + body

    return request


# --- what is asked for


class Things(NamedTuple):
    """Names of one kind: of what another tenant has, and of what nobody has."""

    foreign: list[str]
    unknown: list[str]


class Case(NamedTuple):
    """A way of one tenant to ask for what another may have."""

    kind: str
    ask: Ask


TOKEN_CHARS: Final = string.ascii_letters + string.digits
TOKEN_LENGTH: Final = 8
SLOTS_OF_ONE: Final = 50


def cases_of(bearer: str, token: str, approved: str) -> dict[str, Case]:
    """With a token of the API, the token of one's own upload and that of one's own approval."""
    authorized = f"Authorization: Bearer {bearer}"
    theirs = f"/api/v1/storage/uploads/{THEM}/direct/{{}}.bin"
    ours = f"/api/v1/storage/uploads/{US}/direct/{{}}.bin"
    uploads = "/api/v1/uploads/{}"
    signed = f"expires={int(time.time()) + 3600}&signature={'A' * 43}"
    tus = f"/api/v1/uploads/{token}/tus/{{}}"
    version, offset = "Tus-Resumable: 1.0.0", "Upload-Offset: 0"
    piece = "Content-Type: application/offset+octet-stream"
    unsigned = f"X-Hub-Signature-256: sha256={'0' * 64}"
    body, long_body = b"x" * BYTES, b"x" * MANY_BYTES
    approvals, runs = "/api/v1/approvals/{}", "/api/v1/workflows/{}"
    # The signature is good, and of another approval.
    respond = f"{approvals}/respond?decision=approved&token={approved}"
    forged = f"{approvals}/respond?decision=approved&token=0.{int(time.time())}.{'A' * 43}"
    html, json_type = "Accept: text/html", "Accept: application/json"
    event = json.dumps({"event_name": "held", "payload": 1}).encode()
    return {
        "GET file": Case("digest", asks("GET", theirs, authorized)),
        "GET own file of their bytes": Case("digest", asks("GET", ours, authorized)),
        "HEAD file": Case("digest", asks("HEAD", theirs, authorized)),
        "GET stat": Case("digest", asks("GET", f"{theirs}/stat", authorized)),
        "GET meta": Case("digest", asks("GET", f"{theirs}/meta", authorized)),
        "GET url": Case("digest", asks("GET", f"{theirs}/url", authorized)),
        "PUT hold": Case("digest", asks("PUT", f"{theirs}/hold", authorized)),
        "DELETE file": Case("digest", asks("DELETE", theirs, authorized)),
        "GET download": Case("file", asks("GET", f"/d/{{}}/theirs.bin?{signed}")),
        "HEAD download": Case("file", asks("HEAD", f"/d/{{}}/theirs.bin?{signed}")),
        "GET upload": Case("token", asks("GET", uploads, authorized)),
        "POST cancel": Case("token", asks("POST", f"{uploads}/cancel", authorized)),
        "PUT slot": Case("token", asks("PUT", f"{uploads}/files/0?filename=a&{signed}", body=body)),
        "DELETE slot": Case("token", asks("DELETE", f"{uploads}/files/0?{signed}")),
        "HEAD tus": Case("partial", asks("HEAD", tus, version)),
        "PATCH tus": Case("partial", asks("PATCH", tus, version, offset, piece, body=body)),
        "DELETE tus": Case("partial", asks("DELETE", tus, version)),
        "GET info": Case("near", asks("GET", f"{uploads}/info")),
        "POST complete": Case("near", asks("POST", f"{uploads}/complete")),
        "GET receipt": Case("near", asks("GET", f"{uploads}/receipt")),
        "POST tus": Case("near", asks("POST", f"{uploads}/tus/", version, "Upload-Length: 5")),
        "GET webhook": Case("webhook", asks("GET", "/api/v1/webhooks/{}", authorized)),
        "DELETE webhook": Case("webhook", asks("DELETE", "/api/v1/webhooks/{}", authorized)),
        "POST webhook": Case("webhook", asks("POST", "/api/v1/webhooks/{}", unsigned, body=body)),
        "POST webhook of many bytes": Case(
            "webhook", asks("POST", "/api/v1/webhooks/{}", unsigned, body=long_body)
        ),
        "GET approval": Case("approval", asks("GET", approvals, authorized)),
        "POST cancel of an approval": Case(
            "approval", asks("POST", f"{approvals}/cancel", authorized)
        ),
        "GET link of another approval": Case("approval", asks("GET", respond, html)),
        "GET link of another approval as JSON": Case("approval", asks("GET", respond, json_type)),
        "GET forged link": Case("approval", asks("GET", forged, json_type)),
        "POST forged link": Case("approval", asks("POST", forged, json_type)),
        "GET run": Case("run", asks("GET", runs, authorized)),
        "POST cancel of a run": Case("run", asks("POST", f"{runs}/cancel", authorized)),
        "GET step": Case("run", asks("GET", f"{runs}/steps/ask", authorized)),
        "GET result": Case("run", asks("GET", f"{runs}/steps/ask/result", authorized)),
        "GET wait": Case(
            "tenant",
            asks("GET", "/api/v1/events/{}/wait?event_name=held&timeout=0", authorized),
        ),
        "POST event": Case("tenant", asks("POST", "/api/v1/events/{}", authorized, body=event)),
        "POST complete of a file": Case("file", asks("POST", f"{uploads}/complete")),
    }


# Ways to sign a call, and the secret. The last are signed under the header that is asked with.
HUB: Final = {"header": "X-Hub-Signature-256", "prefix": "sha256="}
SIGNED: Final[dict[str, tuple[str, dict[str, str] | None, str]]] = {
    "github": ("github", None, "theirs"),
    "github, two keys": ("github", None, "two"),
    "slack": ("slack", None, "theirs"),
    "stripe": ("stripe", None, "theirs"),
    "twilio": ("twilio", None, "theirs"),
    "generic": ("generic", None, "theirs"),
    "generic by SHA-1": ("generic", {**HUB, "algorithm": "sha1"}, "theirs"),
    "generic by SHA-512": ("generic", {**HUB, "algorithm": "sha512"}, "two"),
}
CASES: Final = tuple(cases_of("", "", ""))
SHARING: Final = Counter(case.kind for case in cases_of("", "", "").values())


class World:
    """A store of two tenants, filled with things, and the ways of one to the other's."""

    def __init__(self, root: Path, things_of_each: int) -> None:
        """Each case has as many things of its own, so that cold ones are asked for once."""
        self.root = root
        self._count = things_of_each
        settings = Settings(store=StoreSettings(root=root))
        with Store.open(root, settings) as store:
            self._things = _things(store, things_of_each, random.Random(2))
            self.webhooks = _webhooks(store)
            self._filled = _state(store)
            ours = store.uploads(US, "ada").request(UploadRequest("ours", max_files=4))
            link = store.upload_link(ours.upload_token)
            link.begin_partial(0, "a.bin", None, BYTES)
            link.put(1, b"one", filename="one.bin")
            approvals = Workflows(store, load_keys(settings)).approvals(US, "ada")
            asked = approvals.request(ApprovalRequest("ours", "Ours?"))
            url = approvals.links("http://a", asked)[0].approve_url
        keys = load_keys(settings)
        tokens = Tokens(keys.jwt, SystemClock().now_us)
        self.bearers = {
            name: tokens.issue(name, "ada", (ADMIN,), 3600) for name in (US, THEM, OTHERS)
        }
        [approved] = parse_qs(urlsplit(url).query)["token"]
        self._cases = cases_of(self.bearers[US], ours.upload_token, approved)

    def case(self, name: str) -> tuple[Ask, Things]:
        """How to ask, and for what."""
        kind, ask = self._cases[name]
        place = [each for each in CASES if self._cases[each].kind == kind].index(name)
        mine = slice(place * self._count, (place + 1) * self._count)
        things = self._things[kind]
        return ask, Things(things.foreign[mine], things.unknown[mine])

    def check(self) -> None:
        """Nothing of the other tenant was changed by all the asking."""
        with Store.open(self.root, Settings(store=StoreSettings(root=self.root))) as store:
            assert _state(store) == self._filled


def _state(store: Store) -> object:
    workflows = Workflows(store, load_keys(store.settings))
    return (
        store.files(THEM, "bob").usage(),
        [upload.status for upload in store.uploads(THEM, "bob").list().items],
        [webhook.calls for webhook in workflows.webhooks(THEM, "bob").list().items],
        [approval.status for approval in workflows.approvals(THEM, "bob").list().items],
        [run.status for run in workflows.runs(THEM, "bob").list().items],
    )


def _things(store: Store, count: int, chance: random.Random) -> dict[str, Things]:
    """So many for each case, in no order: what was made at once lies together on the disk."""

    def shuffled(names: list[str]) -> list[str]:
        return chance.sample(names, len(names))

    many = {kind: count * cases for kind, cases in SHARING.items()}
    files = store.files(THEM, "bob").put_many(
        PutItem(chance.randbytes(BYTES), "theirs") for _ in range(max(many["digest"], many["file"]))
    )
    uploads = store.uploads(THEM, "bob")
    tokens = shuffled(
        [
            uploads.request(UploadRequest("theirs")).upload_token
            for _ in range(many["token"] + many["near"])
        ]
    )
    partials: list[str] = []
    while len(partials) < many["partial"]:
        asked = uploads.request(UploadRequest("theirs", max_files=SLOTS_OF_ONE))
        link = store.upload_link(asked.upload_token)
        begun = [link.begin_partial(slot, "a", None, BYTES) for slot in range(SLOTS_OF_ONE)]
        partials += [each.partial_id for each in begun]
    workflows = Workflows(store, load_keys(store.settings))
    workflows.secrets(THEM, "bob").put("theirs", b"secret")
    webhooks = workflows.webhooks(THEM, "bob")
    called = WebhookRequest("theirs", "github", "theirs")
    webhook_ids = [webhooks.register(called).webhook_id for _ in range(many["webhook"])]
    approvals = workflows.approvals(THEM, "bob")
    approval_ids = [
        approvals.request(ApprovalRequest(f"theirs-{number}", "Theirs?")).approval_id
        for number in range(many["approval"])
    ]
    run_ids = _runs(store, workflows.runs(THEM, "bob"), many["run"])
    tenants = [f"tenant-{chance.randbytes(6).hex()}" for _ in range(many["tenant"])]
    for tenant in tenants:
        workflows.events(tenant, "bob").emit("held", 1, hold_us=HOUR_US)
    digests = [file.checksum_sha256.hex() for file in files]
    return {
        "approval": _between(shuffled(approval_ids), chance),
        "run": _between(shuffled(run_ids), chance),
        "tenant": Things(tenants, [f"tenant-{chance.randbytes(6).hex()}" for _ in tenants]),
        "digest": Things(shuffled(digests), [chance.randbytes(32).hex() for _ in digests]),
        "file": _between(shuffled([file.file_id for file in files]), chance),
        "partial": _between(shuffled(partials), chance),
        "webhook": _between(shuffled(webhook_ids), chance),
        "token": Things(tokens[: many["token"]], [_token(chance) for _ in range(many["token"])]),
        # All but the last character of somebody's token: nothing is there either way.
        "near": Things(
            [f"{token[:-1]}_" for token in tokens[many["token"] :]],
            [f"{_token(chance)[:-1]}_" for _ in range(many["near"])],
        ),
    }


def _webhooks(store: Store) -> dict[str, list[str]]:
    """Some of each way to sign, by its name."""
    workflows = Workflows(store, load_keys(store.settings))
    workflows.secrets(THEM, "bob").put("two", b"secret\nbefore it")
    webhooks = workflows.webhooks(THEM, "bob")

    def register(signed: str) -> str:
        kind, signature, secret = SIGNED[signed]
        return webhooks.register(WebhookRequest(kind, kind, secret, signature)).webhook_id

    return {signed: [register(signed) for _ in range(WARM_THINGS)] for signed in SIGNED}


def _runs(store: Store, runs: Runs, count: int) -> list[str]:
    """So many runs, each with a step that is done."""
    text = "x" * DEFINITION_BYTES
    ask = Task("ask", "task", [], function="tools.storage.get_url", kwargs={"text": text})
    definition = Definition("theirs", {"ask": ask})
    run_ids = [runs.submit(definition, {}).run_id for _ in range(count)]
    for start in range(0, count, AT_ONCE):

        def finish(txn: Transaction, chunk: list[str] = run_ids[start : start + AT_ONCE]) -> None:
            for run_id in chunk:
                step = Step(run_id, "ask", "", COMPLETED, 1, txn.now_us, txn.now_us, len(text))
                txn.insert(step)
                txn.insert(StepValue(run_id, RESULT, "ask", "", f'"{text}"'.encode()))

        store.catalog.write(finish, actor="bob")
    return run_ids


def _token(chance: random.Random) -> str:
    return "".join(chance.choices(TOKEN_CHARS, k=TOKEN_LENGTH))


def _between(identifiers: list[str], chance: random.Random) -> Things:
    """Beside identifiers, others of the same times: they lie between them in the index."""
    return Things(identifiers, [each[:-12] + chance.randbytes(6).hex() for each in identifiers])


# --- foreign and unknown


def compare(
    connection: Connection, world: World, case: str, pairs: int, repeats: int = WARM_REPEATS
) -> Verdict:
    """Ask for things of both sorts, in turn and in random order; the answers must be equal."""
    ask, things = world.case(case)
    return compare_sorts(connection, case, ask, things, pairs, repeats)


def compare_sorts(
    connection: Connection,
    case: str,
    ask: Ask,
    things: Things,
    pairs: int,
    repeats: int = WARM_REPEATS,
) -> Verdict:
    """As `compare`, for two sorts of things."""
    chance = random.Random(case)

    def pair(number: int) -> tuple[float, float]:
        which = number % len(things.foreign)
        requests = ask(things.foreign[which]), ask(things.unknown[which])
        times, answers = in_random_order(connection, requests, chance, repeats)
        assert answers[0] == answers[1]
        assert answers[0].startswith(b"HTTP/1.1 404")
        return times

    verdict = judge_until_clear(pair, pairs, rounds=ROUNDS_MAX if repeats > 1 else 1)
    sys.stdout.write(
        f"\n{case}: foreign {verdict.shift_us:+.1f} µs of {verdict.median_us:.0f}, "
        f"z {verdict.z:+.1f}, {pairs} pairs\n"
    )
    return verdict


def in_random_order(
    connection: Connection, requests: tuple[bytes, bytes], chance: random.Random, repeats: int
) -> tuple[tuple[float, float], tuple[bytes, bytes]]:
    """The shortest times and the last answers of a pair of requests, asked in turn."""
    order = (0, 1) if chance.random() < 0.5 else (1, 0)
    times: tuple[list[float], list[float]] = ([], [])
    answers = [b"", b""]
    for which in order * repeats:
        taken_us, answers[which] = connection.ask(requests[which])
        times[which].append(taken_us)
    return (min(times[0]), min(times[1])), (answers[0], answers[1])


@contextmanager
def quiet(root: Path) -> Iterator[Served]:
    """A server that answers one request after the other, by the same thread."""
    with serving(
        root,
        GATEWAY__WORKERS="1",
        GATEWAY__THREADS="1",
        LIMITS__LINK_BYTES="0B/d",
        LOG__REQUESTS="none",
    ) as served:
        yield served


@contextmanager
def warm(root: Path) -> Iterator[tuple[Served, World]]:
    world = World(root, WARM_THINGS)
    with quiet(root) as served:
        yield served, world
    world.check()


@contextmanager
def cold(root: Path, pairs: int) -> Iterator[tuple[Served, World]]:
    """Nothing of the store is in memory when the server starts."""
    world = World(root, pairs)
    index = root / "catalog" / "index" / "data.mdb"
    for path in sorted(root.rglob("*")):
        if path.is_file():
            _forget(path)
    for _ in range(FORGETTING):
        if not _in_memory(index):
            break
        _forget(index)
    else:
        pytest.skip("this filesystem keeps what it was told to forget")
    with quiet(root) as served:
        yield served, world
    world.check()


def _forget(path: Path) -> None:
    """Have the kernel drop a file's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # what is not written yet cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _in_memory(path: Path) -> bool:
    """Whether the last page of a file can be read without the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        last = (os.fstat(fd).st_size - 1) // page * page
        return os.preadv(fd, [bytearray(page)], last, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def warmed(disk_folder: Path) -> Iterator[tuple[Served, World]]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        warm(Path(folder)) as both,
    ):
        yield both


@pytest.fixture(scope="module")
def cooled(disk_folder: Path) -> Iterator[tuple[Served, World]]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        cold(Path(folder), COLD_PAIRS) as both,
    ):
        yield both


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_anothers_is_nowhere(warmed: tuple[Served, World], case: str) -> None:
    served, world = warmed
    with connected(served) as connection:
        verdict = compare(connection, world, case, WARM_PAIRS)
    assert not verdict.tells, verdict


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_anothers_is_nowhere_on_the_disk_either(
    cooled: tuple[Served, World], case: str
) -> None:
    served, world = cooled
    with connected(served) as connection:
        verdict = compare(connection, world, case, COLD_PAIRS, ONCE)
    assert not verdict.tells, verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signed", "media_type"),
    [*((signed, "application/json") for signed in list(SIGNED)[1:]), ("twilio", FORM)],
)
def test_how_a_webhook_is_signed_is_not_told(
    warmed: tuple[Served, World], signed: str, media_type: str
) -> None:
    """Else whoever asks for one that is not there would learn which ones are around it, and so
    by and by where each of them is: the work is that of its neighbour."""
    served, world = warmed
    lines = f"X-Hub-Signature-256: sha256={'0' * 64}", f"Content-Type: {media_type}"
    ask = asks("POST", "/api/v1/webhooks/{}", *lines, body=b"a=" + b"x" * MANY_BYTES)
    things = Things(world.webhooks[signed], world.webhooks["github"])
    with connected(served) as connection:
        verdict = compare_sorts(connection, signed, ask, things, WARM_PAIRS)
    assert not verdict.tells, verdict


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_at_length_what_is_anothers_is_nowhere(root: Path) -> None:
    with warm(root) as (served, world), connected(served) as connection:
        verdicts = {case: compare(connection, world, case, SOAK_PAIRS) for case in CASES}
    assert not {case: verdict for case, verdict in verdicts.items() if verdict.tells}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_at_length_what_is_anothers_is_nowhere_on_the_disk_either(root: Path) -> None:
    with cold(root, SOAK_PAIRS) as (served, world), connected(served) as connection:
        verdicts = {case: compare(connection, world, case, SOAK_PAIRS, ONCE) for case in CASES}
    assert not {case: verdict for case, verdict in verdicts.items() if verdict.tells}


@pytest.mark.slow
def test_a_difference_of_fifty_microseconds_is_found_here_too(warmed: tuple[Served, World]) -> None:
    """The control: nothing is told from nothing, unless 50 µs are added to one side."""
    served, world = warmed
    ask = asks("GET", "/api/v1/uploads/{}", f"Authorization: Bearer {world.bearers[THEM]}")
    _, (_, nowhere) = world.case("GET upload")
    chance = random.Random(3)
    with connected(served) as connection:

        def same(number: int) -> tuple[float, float]:
            one, other = (ask(nowhere[(number + step) % WARM_THINGS]) for step in (0, 1))
            return in_random_order(connection, (one, other), chance, WARM_REPEATS)[0]

        def delayed(number: int) -> tuple[float, float]:
            one, other = same(number)
            return one + 50, other

        found = judge_until_clear(
            delayed, WARM_PAIRS, rounds=16 * ROUNDS_MAX, clear=lambda verdict: verdict.tells
        )
        assert found.tells
        assert not judge_until_clear(same, WARM_PAIRS).tells


# --- bytes that another tenant has


def stored(
    connection: Connection, pairs: int, world: World
) -> dict[str, list[tuple[float, float]]]:
    """Times of sending bytes that another tenant has, and bytes that nobody has.

    By a slot, the completion of its upload, and a resumable upload of one piece. The other
    tenant stores something before each, so that what went before is alike.
    """
    chance = random.Random(4)
    taken: dict[str, list[tuple[float, float]]] = {}
    for _ in range(pairs):
        order = (True, False) if chance.random() < 0.5 else (False, True)
        times = {held: _send(connection, world, held, chance) for held in order}
        for way in times[True]:
            taken.setdefault(way, []).append((times[True][way], times[False][way]))
    return taken


def _send(
    connection: Connection, world: World, held: bool, chance: random.Random
) -> dict[str, float]:
    ours, theirs = (f"Authorization: Bearer {world.bearers[name]}" for name in (US, OTHERS))
    wanted = json.dumps({"name": "it", "max_files": 2}).encode()
    _, answer = connection.ask(asks("POST", "/api/v1/uploads", ours, body=wanted)(""))
    asked = json.loads(answer.partition(b"\r\n\r\n")[2])
    url = urlsplit(asked["presigned_urls"][0])
    link = f"/api/v1/uploads/{asked['upload_token']}"
    for_slot, for_tus = chance.randbytes(DEDUPE_BYTES), chance.randbytes(DEDUPE_BYTES)
    for data in (for_slot, for_tus):
        kept = data if held else chance.randbytes(DEDUPE_BYTES)
        connection.ask(asks("POST", "/api/v1/storage?name=it", theirs, body=kept)(""))
    tus = (
        "Tus-Resumable: 1.0.0",
        f"Upload-Length: {DEDUPE_BYTES}",
        "Content-Type: application/offset+octet-stream",
    )
    requests = {
        "PUT slot": asks("PUT", f"{url.path}?{url.query}&filename=a.bin", body=for_slot),
        "POST tus": asks("POST", f"{link}/tus/", *tus, body=for_tus),
        "POST complete": asks("POST", f"{link}/complete"),
    }
    times: dict[str, float] = {}
    for way, ask in requests.items():
        times[way], answer = connection.ask(ask(""))
        assert answer.startswith(b"HTTP/1.1 20"), answer
    return times


def check_dedupe(taken: dict[str, list[tuple[float, float]]]) -> None:
    """Equal but for what is known to remain (DESIGN.md, Threats): when the bytes are there
    already, the writer's copy gets a hidden name instead of the lasting one, and the
    catalog changes a record instead of making one. That shifts a put by about one per cent."""
    for way, times in taken.items():
        verdict = judge(times)
        share = verdict.shift_us / verdict.median_us
        sys.stdout.write(
            f"\n{way} of bytes that another has: {verdict.shift_us:+.0f} µs of "
            f"{verdict.median_us:.0f} ({share:+.1%}), z {verdict.z:+.1f}\n"
        )
        assert abs(share) < DEDUPE_SHARE or abs(verdict.z) < CERTAIN_Z, (way, verdict)


@pytest.mark.slow
def test_sending_what_another_has_takes_as_long(warmed: tuple[Served, World]) -> None:
    served, world = warmed
    with connected(served) as connection:
        check_dedupe(stored(connection, DEDUPE_PAIRS, world))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_at_length_sending_what_another_has_takes_as_long(root: Path) -> None:
    with warm(root) as (served, world), connected(served) as connection:
        check_dedupe(stored(connection, DEDUPE_PAIRS_SOAK, world))
