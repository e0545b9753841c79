"""What is served here, as OpenAI's client sees it."""

from __future__ import annotations

import openai
import pytest


def test_models_are_listed_in_order_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "long"]
    tiny = client.models.retrieve("tiny")
    assert (tiny.object, tiny.owned_by) == ("model", "langmill")
    assert tiny.model_extra == {"does": ["chat", "write"], "max_model_len": 512}
    with pytest.raises(
        openai.NotFoundError, match="there is no model 'tinny' here: did you mean 'tiny'"
    ) as error:
        client.models.retrieve("tinny")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
