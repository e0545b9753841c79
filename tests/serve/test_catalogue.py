"""What is served here, as OpenAI's client and Anthropic's see it."""

from __future__ import annotations

import anthropic
import openai
import pytest


def test_models_are_listed_in_order_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "long"]
    tiny = client.models.retrieve("tiny")
    assert (tiny.object, tiny.owned_by) == ("model", "langmill")
    assert tiny.model_extra is not None
    assert (tiny.model_extra["does"], tiny.model_extra["max_model_len"]) == (["chat", "write"], 512)
    with pytest.raises(
        openai.NotFoundError, match="there is no model 'tinny' here: did you mean 'tiny'"
    ) as error:
        client.models.retrieve("tinny")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_another_client_reads_the_same_list(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        listed = client.models.list()
        assert [one.display_name for one in listed] == ["tiny", "plain", "long"] and not listed.has_more
        assert (listed.first_id, listed.last_id) == ("tiny", "long")
        assert client.models.retrieve("plain").created_at == listed.data[1].created_at
