"""docs/tools.md says what the marks of the tests say."""

import pytest
from promises import DOCUMENT, TOOLS, document, promises


def test_the_document_is_that_of_the_tests() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/promises.py"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_promised_something(tool: str) -> None:
    assert [promise for promise in promises() if promise.tool == tool and promise.supported]
