"""What is mailed, as values: a subject, and the same text plain and as HTML.

Whatever others wrote is escaped in the HTML and stands in no header but the subject. The HTML
has no picture, script or style from elsewhere: nothing tells the sender that it was read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, TypedDict

import jinja2

from cas.clock import SECOND_US
from cas.records import Approval

_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("workflows", "mail_templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Mail(TypedDict):
    """One mail, but for whom it is to."""

    subject: str
    text: str
    html: str


def approval_mail(approval: Approval, approve_url: str, reject_url: str) -> Mail:
    """The mail that asks one addressee to decide."""
    values = {
        "approval": approval,
        "approve_url": approve_url,
        "reject_url": reject_url,
        "until": _moment(approval.expires_at),
    }
    return {
        "subject": approval.title,
        "text": _TEMPLATES.get_template("approval.txt").render(values),
        "html": _TEMPLATES.get_template("approval.html").render(values),
    }


def _moment(at_us: int) -> str:
    """A time for people whose zone nobody knows. In English, whatever the locale."""
    at = datetime.fromtimestamp(at_us // SECOND_US, UTC)
    return f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M} UTC"


_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
