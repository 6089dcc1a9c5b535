"""`/docs` for everybody: light and dark, on a desk and on a phone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.person import PHONE, OpenPage
from tests.browser.test_everybody import check
from tests.gateway.served import Served


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desk", "phone"])
def test_nobody_is_kept_from_reading(
    served: Served, open_page: OpenPage, scheme: str, device: dict[str, Any]
) -> None:
    page = open_page(f"{served.address}/docs", color_scheme=scheme, **device)
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]  # nothing to scroll sideways
    check(page)
