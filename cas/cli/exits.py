"""Exit codes, one per class of error: the one table, which `blobcask --help` shows too.

The first class that an error belongs to decides. Anything not listed is a bug, and comes
with its traceback and Python's own code 1.
"""

from __future__ import annotations

from typing import final

import click

from cas import errors

USAGE = 2
FOUND_WRONG = 11
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE

EXITS: tuple[tuple[type[BaseException], int, str], ...] = (
    (errors.InvalidInput, USAGE, "wrong use: an option, a setting, a name or a reference"),
    (errors.NotFound, 3, "no such file, upload or store"),
    (errors.Mismatch, 4, "the bytes are not the promised ones"),
    (errors.TooLarge, 4, "more bytes than allowed"),
    (errors.Conflict, 5, "not possible in the present state, such as under a hold"),
    (errors.StoreFull, 6, "no space left"),
    (errors.QuotaExceeded, 6, "no more of the tenant's quota"),
    (errors.TooManyRuns, 6, "no more of the tenant's quota"),
    (errors.TooManyApprovals, 6, "no more of the tenant's quota"),
    (errors.TooManyMails, 6, "no more of the tenant's quota"),
    (errors.TooManyHeld, 6, "no more of the tenant's quota"),
    (errors.TooManyKept, 6, "no more of the tenant's quota"),
    (errors.BlobUnavailable, 7, "the bytes are missing or damaged"),
    (errors.CopyUnconfirmed, 14, "stored here, the copy at the bucket not confirmed: ask again"),
    (errors.Damaged, 9, "the journal or the index is damaged"),
    (errors.TargetNeeded, 8, "the store cannot serve: busy, failed or unsuitable"),
    (errors.CatalogError, 8, "the store cannot serve: busy, failed or unsuitable"),
    (errors.AccessDenied, 12, "the server does not accept the token for this"),
    (errors.ServerRefused, 13, "the server gives no usable answer"),
    (errors.ServerUnreachable, 13, "the server gives no usable answer"),
    (errors.ToolFailed, 13, "the server gives no usable answer"),
    (errors.TooManyWaiters, 13, "the server gives no usable answer"),
    (errors.SecretSealed, 8, "the store cannot serve: busy, failed or unsuitable"),
    (errors.BadSignature, 12, "the server does not accept the token for this"),
    (errors.LinkExpired, 12, "the server does not accept the token for this"),
    (errors.BlobcaskError, 1, "any other error"),
    (OSError, 10, "the system refused: no permission, no such source, I/O error"),
)


@final
class WrongFound(click.exceptions.Exit):
    """A check did its work and found something wrong, or a workflow that was followed, or the
    step that was asked for, did not complete; the answer says what."""

    def __init__(self) -> None:
        super().__init__(FOUND_WRONG)


def exit_code(error: BaseException) -> int | None:
    """The code of an error, None when it is a bug."""
    return next((code for kind, code, _ in EXITS if isinstance(error, kind)), None)


def exit_table() -> str:
    """The table for --help."""
    meanings: dict[int, list[str]] = {0: ["done"]}
    for _, code, meaning in EXITS:
        texts = meanings.setdefault(code, [])
        if meaning not in texts:
            texts.append(meaning)
    meanings[FOUND_WRONG] = [
        "a check (doctor, scrub, journal verify) found something wrong",
        "a workflow that was followed (run, resume) failed or was cancelled",
        "so did a step that was asked for (workflow show --step)",
    ]
    meanings[INTERRUPTED] = ["interrupted"]
    meanings[BROKEN_PIPE] = ["whoever read the answer went away"]
    lines = [f"{code:>5}  {'; '.join(texts)}" for code, texts in sorted(meanings.items())]
    return "\n".join(["\b", "Exit codes:", *lines])
