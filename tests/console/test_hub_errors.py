# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a failed request raises is known by class, and its cause is one line without tokens."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from modeling_peer.console.hub_errors import HUB_ERRORS, hub_cause


def test_a_server_that_does_not_answer_raises_one_of_the_errors():
    with pytest.raises(HUB_ERRORS) as caught:
        HfApi(endpoint="http://127.0.0.1:9").model_info("someone/model", timeout=2)
    assert type(caught.value).__name__ in hub_cause(caught.value)


def test_the_hubs_own_error_is_one_of_them_and_a_bug_is_none():
    assert issubclass(HfHubHTTPError, HUB_ERRORS)
    for error in (TypeError, KeyError, AttributeError, ValueError):
        assert not issubclass(error, HUB_ERRORS)


def test_a_cause_is_one_line_with_the_error_behind_it_and_no_token():
    error = RuntimeError(
        "The upload failed.\n\nFor more information see https://example.org\nToken: hf_abcdefghijklmnop"
    )
    error.__cause__ = OSError("disk full")
    assert hub_cause(error) == "RuntimeError: The upload failed. Token: <hidden> disk full"
