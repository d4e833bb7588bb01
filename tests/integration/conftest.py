"""Lets pytest explain failed assertions in the helper, which is not itself collected."""

import pytest

pytest.register_assert_rewrite("tests.integration.daemon")
