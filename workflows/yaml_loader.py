"""PyYAML's safe loader, without aliases: one may stand for much, again and again, so that a
kilobyte becomes gigabytes. They are refused where they stand, and the text is read once.

libyaml reads where PyYAML was built with it; nodes are composed in Python all the same, where
too many levels are an error and not the end of the process.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import Composer, ComposerError

try:
    from yaml import CSafeLoader as _Safe
except ImportError:  # built without libyaml
    from yaml import SafeLoader as _Safe  # type: ignore[assignment]


class _WithoutAliases(Composer):
    # `check_event` and `peek_event` are the parser's, whichever that is.
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            event: Any = self.peek_event()  # type: ignore[attr-defined]
            raise ComposerError(None, None, "aliases are not taken", event.start_mark)
        return super().compose_node(parent, index)


class PlainLoader(_WithoutAliases, _Safe):
    """For `yaml.load`; raises ComposerError for an alias."""

    def __init__(self, stream: Any) -> None:
        _Safe.__init__(self, stream)
        Composer.__init__(self)  # libyaml's loader composes without it
