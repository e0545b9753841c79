"""What every route works with: made once at the start, handed down, never changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from langmill.common.settings import ServeSettings
from langmill.serve.models import Models, load_models

if TYPE_CHECKING:  # their routes and doors are made over a State
    from langmill.serve.history import History
    from langmill.serve.keys import Keys
    from langmill.serve.limits import Limits
    from langmill.serve.metrics import Metrics


@dataclass(frozen=True)
class State:
    """history: None where no conversations are kept."""

    settings: ServeSettings
    models: Models
    metrics: Metrics
    keys: Keys
    limits: Limits
    history: History | None = None


def open_state(settings: ServeSettings) -> State:
    """The models loaded, and everything beside them ready. Raises as `load_models`, and for a bad file of keys."""
    from langmill.serve.history import open_history
    from langmill.serve.keys import open_keys
    from langmill.serve.limits import Limits
    from langmill.serve.metrics import Metrics

    keys, history = open_keys(settings), open_history(settings)  # before the long part
    models = load_models(settings)
    return State(settings, models, Metrics(models), keys, Limits(settings), history)
