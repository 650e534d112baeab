"""What the tests of error messages share."""

from collections.abc import Callable
from typing import Any

import pytest

Kind = type[Exception] | tuple[type[Exception], ...]
EITHER = (TypeError, ValueError)


def refuses(kind: Kind, match: str, call: Callable[[], Any]) -> None:
    """One of these kinds and no subclass, so that an error out of the depths of torch does not pass."""
    with pytest.raises(kind, match=match) as caught:
        call()
    assert type(caught.value) in (kind if isinstance(kind, tuple) else (kind,))
